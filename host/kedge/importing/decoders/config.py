"""Reads a decoder's ``config.json`` as a :class:`DecoderSpec`. An unknown value that would change the function is an
error that names the key."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge.importing.decoders import config_values
from kedge_protocol.errors import ModelError
from kedge_targets.decoder import spec as specs
from kedge_targets.decoder.spec import DecoderSpec, LayerKind, Rotary

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2")
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("num_local_experts", "num_experts", "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"),
        (None, 0, 1),
    ),
    **dict.fromkeys(
        ("quantization_config", "final_logit_softcapping", "attn_logit_softcapping", "no_rope_layers", "pruned_heads"),
        (None, {}, [], 0, 0.0),
    ),
    **dict.fromkeys(
        ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"), (None, 1, 1.0)
    ),
    **dict.fromkeys(
        (
            "rope_interleaved",
            "alibi",
            "parallel_attn",
            "add_cross_attention",
            "is_encoder_decoder",
            "scale_attn_by_inverse_layer_idx",
            "use_bidirectional_attention",
            "clip_qkv",
        ),
        (None, False),
    ),
    "scale_attn_weights": (None, True),
}
"""Keys that change the function, with their neutral values."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        ModelError: the file is missing or not a JSON object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelError(f"cannot be read: {reason}", where=str(path), remedy="Fetch the folder again") from error
    if not isinstance(found, dict):
        raise ModelError("is no JSON object", where=str(path), remedy="Fetch the folder again")
    return found


def spec_of(config: Mapping[str, Any], *, where: str) -> DecoderSpec:
    """Return the specification that a configuration describes.

    Raises:
        ModelError: an architecture or a key's value is unknown, or a key is missing.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelError(
            f"model_type {family!r} is not read",
            where=where,
            remedy=f"Known are {', '.join(FAMILIES)} (SmolLM is llama), t5, marian, whisper; export others to ONNX",
        )
    config_values.check_neutral(config, _NEUTRAL, where=where)
    with config_values.reading(where):
        found = _gpt2(config, where) if family == "gpt2" else _rotating(str(family), config, where)
    specs.check(found, where=where)
    return found


def _rotating(family: str, config: Mapping[str, Any], where: str) -> DecoderSpec:
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    gemma = family == "gemma3_text"
    head_size = int(config.get("head_dim") or hidden // heads)
    query = config.get("query_pre_attn_scalar") if gemma else None
    return DecoderSpec(
        architecture=family,
        hidden=hidden,
        intermediate=int(config["intermediate_size"]),
        heads=heads,
        kv_heads=int(config.get("num_key_value_heads") or heads),
        head_size=head_size,
        vocabulary=int(config["vocab_size"]),
        context=int(config["max_position_embeddings"]),
        layers=_layers(family, config, where),
        activation=config_values.activation(
            config.get("hidden_activation") or config.get("hidden_act", "silu"), _ACTIVATIONS, where=where
        ),
        norm_epsilon=float(config.get("rms_norm_eps", 1e-6)),
        norm_offset=1.0 if gemma else 0.0,
        qk_norm=family in ("qwen3", "gemma3_text"),
        post_norms=gemma,
        attention_scale=float(query or head_size) ** -0.5,
        embedding_scale=hidden**0.5 if gemma else 1.0,
        tied=bool(config.get("tie_word_embeddings", gemma)),
    )


def _gpt2(config: Mapping[str, Any], where: str) -> DecoderSpec:
    hidden, heads = int(config["n_embd"]), int(config["n_head"])
    return DecoderSpec(
        architecture="gpt2",
        hidden=hidden,
        intermediate=int(config.get("n_inner") or 4 * hidden),
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        vocabulary=int(config["vocab_size"]),
        context=int(config.get("n_positions") or config["n_ctx"]),
        layers=(LayerKind(rotary=None),) * int(config["n_layer"]),
        activation=config_values.activation(config.get("activation_function", "gelu_new"), _ACTIVATIONS, where=where),
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-5)),
        attention_scale=(hidden // heads) ** -0.5,
        gated=False,
        norm="layer",
        tied=bool(config.get("tie_word_embeddings", True)),
        learned_positions=True,
    )


def _layers(family: str, config: Mapping[str, Any], where: str) -> tuple[LayerKind, ...]:
    count = int(config["num_hidden_layers"])
    window = _window(family, config)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = _usual_kinds(family, config, count, window)
    if len(kinds) != count:
        raise ModelError(f"layer_types has {len(kinds)} entries for {count} layers", where=where)
    known = {}
    for kind in dict.fromkeys(kinds):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(f"layer_types holds {kind!r}, which is not known", where=where)
        sliding = kind == "sliding_attention"
        known[kind] = LayerKind(rotary=_rotary(family, config, kind, where), window=window if sliding else None)
    return tuple(known[kind] for kind in kinds)


def _window(family: str, config: Mapping[str, Any]) -> int | None:
    window = config.get("sliding_window")
    used = bool(config.get("use_sliding_window", family not in ("qwen2", "qwen3")))
    return int(window) if window and used and family != "llama" else None


def _usual_kinds(family: str, config: Mapping[str, Any], count: int, window: int | None) -> list[str]:
    if window is None:
        return ["full_attention"] * count
    if family == "gemma3_text":
        every = int(config.get("sliding_window_pattern", 6))
        return ["full_attention" if (at + 1) % every == 0 else "sliding_attention" for at in range(count)]
    first = int(config.get("max_window_layers", 0)) if family in ("qwen2", "qwen3") else 0
    return ["sliding_attention" if at >= first else "full_attention" for at in range(count)]


def _rotary(family: str, config: Mapping[str, Any], kind: str, where: str) -> Rotary:
    """Return the rotary embedding of one kind of layer; transformers 5 writes ``rope_parameters``, older versions wrote
    single keys."""
    parameters = config.get("rope_parameters") or {}
    if isinstance(parameters.get(kind), Mapping):
        parameters = parameters[kind]
        key = f"rope_parameters.{kind}"
    elif parameters:
        key = "rope_parameters"
    else:
        key = "rope_scaling"
        parameters = dict(config.get("rope_scaling") or {})
        local = family == "gemma3_text" and kind == "sliding_attention"
        if local:
            # Gemma 3 scales only what looks back all the way.
            parameters = {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
        parameters.setdefault("rope_theta", config.get("rope_theta", 1e6 if family == "gemma3_text" else 10000.0))
    share = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    rope = parameters.get("rope_type") or parameters.get("type") or "default"
    if rope not in specs.ROTARY_KINDS:
        raise ModelError(
            f"{key}: the kind {rope!r} is not supported",
            where=where,
            remedy=f"Known are {', '.join(specs.ROTARY_KINDS)}; take the model's variant of plain context length",
        )
    theta = float(parameters.get("rope_theta", config.get("rope_theta", 10000.0)))
    if rope == "default":
        return Rotary(theta=theta, share=float(share))
    if rope == "linear":
        return Rotary(theta=theta, share=float(share), kind=rope, factor=float(parameters["factor"]))
    return Rotary(
        theta=theta,
        share=float(share),
        kind=rope,
        factor=float(parameters["factor"]),
        low_frequency_factor=float(parameters["low_freq_factor"]),
        high_frequency_factor=float(parameters["high_freq_factor"]),
        original_context=int(parameters["original_max_position_embeddings"]),
    )
