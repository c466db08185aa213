"""Merges a LoRA folder (peft: ``adapter_config.json`` and ``adapter_model.safetensors``) into the weights that it was
trained on: ``W + B A * alpha / rank`` (Hu et al., "LoRA", 2021)."""

from __future__ import annotations

import re
from pathlib import Path

from kedge.importing.decoders import tensors
from kedge.importing.decoders.config import read_json
from kedge.importing.decoders.decoder import Weights
from kedge_protocol.errors import ModelError
from kedge_targets.decoder.spec import Array, DecoderSpec

_NAMES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
_TENSOR = re.compile(r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
# What changes the formula, with the values that do not.
_NEUTRAL = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),  # others change the model's own weights
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
}


class _Merged:
    """Weights merged with an adapter; a layer is merged when it is read."""

    def __init__(self, weights: Weights, pairs: dict[tuple[int, str], tuple[Array, Array]]) -> None:
        self._weights = weights
        self._pairs = pairs

    def outer(self, name: str) -> Array:
        return self._weights.outer(name)

    def has_bias(self, name: str) -> bool:
        return self._weights.has_bias(name)

    def layer(self, index: int) -> dict[str, Array]:
        found = self._weights.layer(index)
        for name in list(found):
            if (index, name) in self._pairs:
                down, up = self._pairs[index, name]
                found[name] = found[name] + up @ down
        return found


def merged(weights: Weights, spec: DecoderSpec, folder: Path) -> Weights:
    """Return the weights merged with an adapter.

    Raises:
        ModelError: the folder is not LoRA, changes more than plain LoRA does, or is for another model.
    """
    config = read_json(folder / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"peft_type {config.get('peft_type')!r} is not merged", where=str(folder), remedy="Give LoRA")
    for key, neutral in _NEUTRAL.items():
        if config.get(key) not in neutral:
            raise ModelError(f"{key} = {config[key]!r} is not supported", where=str(folder), remedy="Give plain LoRA")
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ModelError(f"{key} is not supported", where=str(folder), remedy="Give LoRA of one rank and alpha")
    stored = tensors.of_folder(folder, whole="adapter_model.safetensors", index="adapter_model.safetensors.index.json")
    scale = _scale(config, folder)
    halves: dict[tuple[int, str], dict[str, Array]] = {}
    for name in sorted(stored.names):
        found = _TENSOR.fullmatch(name)
        if found is None or found[2] not in _NAMES or int(found[1]) >= len(spec.layers):
            raise ModelError(f"the tensor {name!r} belongs to no matrix of this model", where=str(folder))
        halves.setdefault((int(found[1]), _NAMES[found[2]]), {})[found[3]] = stored.read(name)
    pairs = {}
    for (index, name), half in halves.items():
        if set(half) != {"A", "B"}:
            raise ModelError(f"layer {index}, {name}: one half of the pair is missing", where=str(folder))
        pairs[index, name] = (half["A"] * scale, half["B"])
    _check(weights, pairs, folder)
    return _Merged(weights, pairs)


def _scale(config: dict[str, object], folder: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ModelError("'r' or 'lora_alpha' is no number", where=str(folder / "adapter_config.json"))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _check(weights: Weights, pairs: dict[tuple[int, str], tuple[Array, Array]], folder: Path) -> None:
    layer = weights.layer(0)  # all have the same shapes
    for (index, name), (down, up) in pairs.items():
        shape = layer[name].shape if name in layer else None
        if shape != (up.shape[0], down.shape[1]) or up.shape[1] != down.shape[0]:
            raise ModelError(
                f"layer {index}, {name}: the adapter is for {up.shape[0]} x {down.shape[1]}, the model has {shape}",
                where=str(folder),
                remedy="Give the adapter of this very model",
            )
