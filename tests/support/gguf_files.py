"""Random tiny decoders as GGUF files, in every storage type, beside the Hugging Face folder of the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import decoders

Array = npt.NDArray[Any]

_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3_text": "gemma3"}
_SCALES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the blocks of a K-quant, which the package can read and not write, have their float16 scales."""
_LAYER = {
    "attention_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "feed_forward_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_post_norm": "post_attention_norm",
    "feed_forward_post_norm": "post_ffw_norm",
}


def raw(tensor: Array, kind: str) -> Array:
    """A matrix in a storage type: quantized by the package, of a K-quant a matrix of random codes."""
    import gguf

    one = gguf.GGMLQuantizationType[kind]
    if kind not in _SCALES:
        return np.asarray(gguf.quants.quantize(tensor, one))
    block, size = gguf.GGML_QUANT_SIZES[one]
    random = np.random.default_rng(tensor.shape[0])
    found = random.integers(0, 256, (tensor.size // block, size)).astype(np.uint8)
    for at in _SCALES[kind]:
        found[:, at : at + 2] = np.full((len(found), 1), 0.002, np.float16).view(np.uint8)
    return found.reshape(tensor.shape[0], -1)


def stored(tensor: Array, kind: str) -> Array:
    """The numbers of :func:`raw`, float32."""
    import gguf

    one = gguf.GGMLQuantizationType[kind]
    return np.asarray(gguf.quants.dequantize(raw(tensor, kind), one), np.float32).reshape(tensor.shape)


def write(
    path: Path, name: str, *, kind: str = "F32", changed: dict[str, Any] | None = None, template: str | None = None
) -> Path:
    """Write a GGUF file; the folder of the same model lies at ``path.with_suffix(".folder")``.

    Args:
        name: one of :data:`tests.support.decoders.CONFIGURATIONS`.
        kind: the storage type of the layers' matrices.
        changed: keys of the configuration with other values.
        template: the chat template.
    """
    import gguf

    from kedge.importing.decoders import reading

    decoders.folder(path.with_suffix(".folder"), name, changed=changed, stored=lambda tensor: stored(tensor, kind))
    source = reading.read(path.with_suffix(".folder"))
    spec = source.spec
    writer = gguf.GGUFWriter(str(path), _ARCHITECTURES[spec.architecture])
    _header(writer, spec)
    if template is not None:
        writer.add_chat_template(template)
    for own, title in (("embedding", "token_embd"), ("norm", "output_norm"), ("head", "output")):
        if own != "head" or not spec.tied:
            writer.add_tensor(f"{title}.weight", _norms(spec, own, source.weights.outer(own)))
    for index in range(len(spec.layers)):
        for own, tensor in source.weights.layer(index).items():
            _layer_tensor(writer, spec, index, own, tensor, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _header(writer: Any, spec: Any) -> None:
    writer.add_context_length(spec.context)
    writer.add_embedding_length(spec.hidden)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_block_count(len(spec.layers))
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_key_length(spec.head_size)
    writer.add_layer_norm_rms_eps(spec.norm_epsilon)
    rotary = spec.layers[-1].rotary
    writer.add_rope_freq_base(rotary.theta)
    if rotary.kind == "linear":
        writer.add_rope_scaling_type(_linear())
        writer.add_rope_scaling_factor(rotary.factor)
    elif rotary.kind == "llama3":
        plain = rotary.theta ** (-np.arange(0, spec.head_size, 2) / spec.head_size)
        writer.add_tensor("rope_freqs.weight", (plain / rotary.frequencies(spec.head_size)).astype(np.float32))
    if spec.layers[0].window:
        writer.add_sliding_window(spec.layers[0].window)
    count = spec.vocabulary
    letters = ["<unk>", "<s>", "</s>", *(chr(32 + at) for at in range(count - 4))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(letters + ["<pad>"] * (count - len(letters)))
    writer.add_token_types([3] * 3 + [1] * (count - 3))
    writer.add_eos_token_id(2)


def _linear() -> Any:
    import gguf

    return gguf.RopeScalingType.LINEAR


def _norms(spec: Any, own: str, tensor: Array) -> Array:
    """llama.cpp stores what Gemma's norms multiply with."""
    return tensor + np.float32(spec.norm_offset) if "norm" in own else tensor


def _layer_tensor(writer: Any, spec: Any, index: int, own: str, tensor: Array, kind: str) -> None:
    import gguf

    stem, _, bias = own.partition(".")
    title = f"blk.{index}.{_LAYER[stem]}.{bias or 'weight'}"
    if tensor.ndim == 1:
        writer.add_tensor(title, _norms(spec, own, tensor))
        return
    # The codes of what was stored: quantizing a second time finds the same ones, a K-quant is drawn by its shape.
    value = raw(tensor, kind)
    if _ARCHITECTURES[spec.architecture] == "llama" and stem in ("q", "k"):
        # llama.cpp's order: the two halves of a head interleaved.
        heads = spec.heads if stem == "q" else spec.kv_heads
        value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    writer.add_tensor(title, np.ascontiguousarray(value), raw_dtype=gguf.GGMLQuantizationType[kind])
