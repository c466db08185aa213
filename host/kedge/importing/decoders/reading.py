"""Reads a decoder from a folder or a GGUF file, without torch and without transformers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kedge.importing import digests
from kedge.importing.decoders import config, encoder_config, encoder_text, exported, lora, tensors, text
from kedge.importing.decoders.decoder import Decoder
from kedge.importing.decoders.encoder_names import EncoderDecoderWeights
from kedge.importing.decoders.names import NamedWeights
from kedge_protocol import digest
from kedge_protocol.errors import ModelError

_GGUF = b"GGUF"
_WITH_ENCODER = ("ForConditionalGeneration", "MarianMTModel")


def is_decoder(path: Path) -> bool:
    """Return whether a path is a decoder: a folder whose ``config.json`` says so, a GGUF file, or an ONNX file with
    past and present. No weights are read.

    Raises:
        ModelError: ``config.json`` cannot be read.
    """
    if exported.is_exported(path):
        return True
    if path.is_dir():
        return (path / "config.json").exists() and _says_so(path / "config.json")
    if path.suffix.lower() == ".gguf" and path.is_file():
        return True  # reading it says what is wrong with it
    try:
        with path.open("rb") as file:
            return file.read(4) == _GGUF
    except OSError:
        return False


def has_encoder(path: Path) -> bool:
    """Return whether a path is a folder of an encoder-decoder. No weights are read."""
    return path.is_dir() and config.read_json(path / "config.json").get("model_type") in encoder_config.FAMILIES


def _says_so(path: Path) -> bool:
    found = config.read_json(path)
    architectures = found.get("architectures")
    if isinstance(architectures, list) and architectures:
        return str(architectures[0]).endswith(("ForCausalLM", "LMHeadModel", *_WITH_ENCODER))
    return found.get("model_type") in (*config.FAMILIES, *encoder_config.FAMILIES)


def read(path: Path, *, adapter: Path | None = None) -> Decoder:
    """Read everything but the weights.

    Args:
        adapter: a LoRA folder (peft) to merge into the weights as they are read.

    Raises:
        ModelError: a file is missing, truncated or damaged, or an architecture or key is unknown.
        MissingDependencyError: the file is GGUF, and the ``generation`` extra is not installed.
    """
    if not path.is_dir():
        from kedge.importing.decoders import gguf_file

        found = gguf_file.read(path)
    else:
        found = _folder(path)
    if adapter is None:
        return found
    if found.spec.encoder is not None:
        raise ModelError("adapters of encoder-decoders are not merged", where=str(adapter), remedy="Merge it before")
    whole = digest.of_bytes(f"{found.source_digest} {digests.of_path(adapter)[0]}".encode())
    return replace(found, weights=lora.merged(found.weights, found.spec, adapter), source_digest=whole)


def _folder(folder: Path) -> Decoder:
    raw = config.read_json(folder / "config.json")
    if raw.get("model_type") in encoder_config.FAMILIES:
        return _with_encoder(folder, raw)
    spec = config.spec_of(raw, where=str(folder / "config.json"))
    stored = tensors.of_folder(folder)
    texts = text.of_folder(folder, raw)
    weights = NamedWeights(stored, spec, where=str(folder))
    found, size = digests.of_path(folder)
    return Decoder(
        spec=spec,
        weights=weights,
        text=texts,
        source_digest=found,
        size_bytes=sum(file.stat().st_size for file in stored.files) or size,
        parameters=stored.parameters,
    )


def _with_encoder(folder: Path, raw: dict[str, Any]) -> Decoder:
    spec = encoder_config.spec_of(raw, where=str(folder / "config.json"))
    stored = tensors.of_folder(folder)
    texts = encoder_text.of_folder(folder, raw, spec)
    weights = EncoderDecoderWeights(stored, spec, where=str(folder))
    found, size = digests.of_path(folder)
    return Decoder(
        spec=weights.spec,
        weights=weights,
        text=texts,
        source_digest=found,
        size_bytes=sum(file.stat().st_size for file in stored.files) or size,
        parameters=stored.parameters,
    )
