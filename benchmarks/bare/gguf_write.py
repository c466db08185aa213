"""Writes a Hugging Face folder of a Llama as GGUF, each block rounded by llama.cpp's own quantizer.

usage: gguf_write.py FOLDER SOURCE.gguf KIND OUT.gguf

Key-value pairs are taken from ``SOURCE``, a GGUF file of the same model; ``KIND`` is Q4_0, Q4_1 or Q4_K_M. Which matrix
gets which type follows ``llama_tensor_get_type`` in llama.cpp's llama-quant.cpp: rows that are no multiple of 256 have
no K-quants, and fall back from Q4_K to Q5_0 and from Q6_K to Q8_0.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import xllamacpp.xllamacpp
from gguf import GGMLQuantizationType as Type

_SUPER = 256
_FALLBACK = {Type.Q4_K: Type.Q5_0, Type.Q6_K: Type.Q8_0}
_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def kind_of(name: str, columns: int, kind: str, layers: int) -> Type:
    """The type of a matrix."""
    if name == "token_embd":  # the head as well
        found = Type.Q6_K
    elif kind != "Q4_K_M":
        found = Type[kind]
    else:
        found = Type.Q4_K
        part, layer = name.split(".")[-1], int(name.split(".")[1])
        more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
        if part in ("attn_v", "ffn_down") and more:
            found = Type.Q6_K
    return _FALLBACK.get(found, found) if columns % _SUPER else found


def rounded(library: ctypes.CDLL, values: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes of a matrix [rows, bytes of a row]."""
    rows, columns = values.shape
    block, size = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((rows, columns // block * size), np.uint8)
    values = np.ascontiguousarray(values, np.float32)
    numbers = [ctypes.c_int64(one) for one in (0, rows, columns)]
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    pointers = ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(out.ctypes.data)
    if chunk(ctypes.c_int(int(kind)), *pointers, *numbers, None) != out.nbytes:
        raise RuntimeError(f"{kind.name} of {values.shape}")
    return out


def turned(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in llama.cpp's order: the two channels of a pair lie side by side."""
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    raw = np.memmap(path, np.uint8, offset=8 + size)
    return {
        name: raw[slice(*one["data_offsets"])].view(np.float32).reshape(one["shape"])
        for name, one in header.items()
        if name != "__metadata__"
    }


def main(folder: Path, source: Path, kind: str, out: Path) -> None:
    """Write the file."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    settings = json.loads((folder / "config.json").read_text())
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        sub = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=sub)
    heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
    for long, values in tensors(folder / "model.safetensors").items():
        stem = long.removeprefix("model.").removesuffix(".weight")
        name = {"embed_tokens": "token_embd", "norm": "output_norm"}.get(stem, "")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            name = f"blk.{layer}.{_NAMES[part]}"
        if values.ndim == 1:
            writer.add_tensor(f"{name}.weight", np.array(values))
            continue
        if (part := name.split(".")[-1]) in heads:
            values = turned(values, heads[part])
        stored = kind_of(name, values.shape[1], kind, settings["num_hidden_layers"])
        writer.add_tensor(f"{name}.weight", rounded(library, values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
