"""Reads the ``config.json`` of an encoder-decoder (T5, Marian, Whisper) as a :class:`DecoderSpec` with an encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedge.importing.decoders import config_values
from kedge_targets.decoder import spec as specs
from kedge_targets.decoder.spec import DecoderSpec, EncoderSpec, LayerKind, RelativePositions

T5, MARIAN, WHISPER = "t5", "marian", "whisper"
FAMILIES = (T5, "mt5", MARIAN, WHISPER)
CONTEXT = 512
"""Positions of a T5 whose configuration names none; its biases by distance set no limit."""
_ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("normalize_before", "normalize_embedding", "add_final_layer_norm", "extra_pos_embeddings", "is_decoder"),
        (None, False, 0),
    ),
    "quantization_config": (None, {}),
    "is_encoder_decoder": (None, True),
}
"""Keys that change the function, with their neutral values."""


def spec_of(config: Mapping[str, Any], *, where: str) -> DecoderSpec:
    """Return the specification that a configuration describes.

    Raises:
        ModelError: a key's value is unknown, or a key is missing.
    """
    family = str(config["model_type"])
    config_values.check_neutral(config, _NEUTRAL, where=where)
    with config_values.reading(where):
        found = _t5(config, where) if family in (T5, "mt5") else _bart(family, config, where)
    specs.check(found, where=where)
    return found


def _t5(config: Mapping[str, Any], where: str) -> DecoderSpec:
    hidden, heads, size = int(config["d_model"]), int(config["num_heads"]), int(config["d_kv"])
    layers = int(config["num_layers"])
    kind = str(config.get("feed_forward_proj", "relu"))
    gated = kind.startswith("gated-")
    # As transformers has it: the gated GELU is the approximation by tanh, whatever its name says.
    activation = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    context = int(config.get("n_positions") or CONTEXT)
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings") is not False)
    return DecoderSpec(
        architecture=T5,
        hidden=hidden,
        intermediate=int(config["d_ff"]),
        heads=heads,
        kv_heads=heads,
        head_size=size,
        vocabulary=int(config["vocab_size"]),
        context=context,
        layers=(LayerKind(rotary=None),) * int(config.get("num_decoder_layers") or layers),
        activation=config_values.activation(activation, _ACTIVATIONS, where=where),
        norm_epsilon=float(config.get("layer_norm_epsilon", 1e-6)),
        attention_scale=1.0,
        gated=gated,
        relative=RelativePositions(
            buckets=int(config.get("relative_attention_num_buckets", 32)),
            largest=int(config.get("relative_attention_max_distance", 128)),
        ),
        head_scale=hidden**-0.5 if scaled else 1.0,
        encoder=EncoderSpec(
            kind=specs.TEXT,
            layers=layers,
            heads=heads,
            head_size=size,
            intermediate=int(config["d_ff"]),
            attention_scale=1.0,
            context=context,
            vocabulary=int(config["vocab_size"]),
        ),
    )


def _bart(family: str, config: Mapping[str, Any], where: str) -> DecoderSpec:
    """Return the specification of Marian or Whisper, which have the layers of BART; Whisper's norms come first."""
    hidden, heads = int(config["d_model"]), int(config["decoder_attention_heads"])
    others = int(config["encoder_attention_heads"])
    sound = family == WHISPER
    context = int(config["max_target_positions" if sound else "max_position_embeddings"])
    vocabulary = int(config["vocab_size"])
    own = int(config.get("decoder_vocab_size") or vocabulary)
    return DecoderSpec(
        architecture=family,
        hidden=hidden,
        intermediate=int(config["decoder_ffn_dim"]),
        heads=heads,
        kv_heads=heads,
        head_size=hidden // heads,
        vocabulary=vocabulary if sound else own,
        context=context,
        layers=(LayerKind(rotary=None),) * int(config["decoder_layers"]),
        activation=config_values.activation(config.get("activation_function", "gelu"), _ACTIVATIONS, where=where),
        norm_epsilon=1e-5,
        attention_scale=(hidden // heads) ** -0.5,
        gated=False,
        norm="layer",
        norm_last=not sound,
        embedding_scale=hidden**0.5 if config.get("scale_embedding") else 1.0,
        learned_positions=True,
        head_bias=not sound,
        encoder=EncoderSpec(
            kind=specs.SOUND if sound else specs.TEXT,
            layers=int(config["encoder_layers"]),
            heads=others,
            head_size=hidden // others,
            intermediate=int(config["encoder_ffn_dim"]),
            attention_scale=(hidden // others) ** -0.5,
            context=int(config["max_source_positions"]) if sound else context,
            vocabulary=0 if sound else vocabulary,
            mels=int(config["num_mel_bins"]) if sound else 0,
            own_embedding=not sound and config.get("share_encoder_decoder_embeddings") is False,
        ),
    )
