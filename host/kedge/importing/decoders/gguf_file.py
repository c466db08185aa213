"""Reads a GGUF file (ggml/docs/gguf.md of llama.cpp) as a decoder: its header as a configuration, its tensors
dequantized to float32 by the ``gguf`` package on demand, its vocabulary as ``tokenizer.json``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kedge.importing import digests
from kedge.importing.decoders import config, config_values, gguf_text
from kedge.importing.decoders.decoder import Decoder
from kedge.importing.decoders.names import NamedWeights
from kedge_protocol.errors import MissingDependencyError, ModelError
from kedge_protocol.packages import pip_install
from kedge_targets.decoder import layout
from kedge_targets.decoder.spec import Array, DecoderSpec, LayerKind

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    **_LAYER,
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_FREQUENCIES = "rope_freqs.weight"
_AGAIN = "Fetch the file again"


class GgufTensors:
    """The tensors of a GGUF file under Hugging Face's names."""

    def __init__(self, tensors: list[Any], raw: dict[str, Any], where: str) -> None:
        self._raw = raw
        self._where = where
        self._llama = raw["model_type"] == "llama"
        self._gemma = raw["model_type"] == "gemma3_text"
        self._by_name = {self._named(one.name): one for one in tensors if one.name != _FREQUENCIES}

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._by_name)

    @property
    def parameters(self) -> int:
        """Return the total number of weights."""
        return sum(int(one.n_elements) for one in self._by_name.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(int(axis) for axis in reversed(self._by_name[name].shape))

    def read(self, name: str) -> Array:
        """Return a tensor as float32.

        Raises:
            ModelError: the tensor's type is unknown.
        """
        import gguf

        if name not in self._by_name:
            raise ModelError(f"has no tensor {name!r}", where=self._where, remedy=_AGAIN)
        one = self._by_name[name]
        try:
            values = gguf.quants.dequantize(one.data, one.tensor_type)
        except NotImplementedError as error:
            raise ModelError(
                f"the tensor {one.name!r} is of type {one.tensor_type.name}, which is not read",
                where=self._where,
                remedy="Give F32, F16, BF16, Q4_0, Q4_1, Q8_0 or a K-quant",
            ) from error
        found: Array = np.asarray(values, np.float32).reshape(self.shape(name))
        if self._gemma and name.endswith("norm.weight"):
            # llama.cpp stores what the weight is multiplied with; Hugging Face stores 1 less.
            found = found - np.float32(1)
        for part, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if self._llama and f".{part}." in name:
                found = _half_split(found, int(self._raw[key]))
        return found

    def _named(self, name: str) -> str:
        stem, _, part = name.rpartition(".")
        if stem in _OUTER:
            return f"{_OUTER[stem]}.{part}"
        pieces = stem.split(".", 2)
        table = _GEMMA if self._gemma else _LAYER
        if len(pieces) == 3 and pieces[0] == "blk" and pieces[2] in table:
            return f"model.layers.{pieces[1]}.{table[pieces[2]]}.{part}"
        raise ModelError(f"the tensor {name!r} is not known", where=self._where, remedy="Only plain decoders are read")


def _half_split(weight: Array, heads: int) -> Array:
    """Reorder rows for half-split pairs: llama.cpp rotates neighbouring channels, Hugging Face those half a head apart;
    the rows of ``llama`` files are in the former's order."""
    rows = weight.reshape(heads, -1, 2, *weight.shape[1:])
    return np.ascontiguousarray(rows.swapaxes(1, 2)).reshape(weight.shape)


def read(path: Path) -> Decoder:
    """Read a file's header; see :func:`kedge.importing.decoders.reading.read`."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(
            f"gguf cannot be loaded: {error}", remedy=f"Install it with {pip_install('generation')}"
        ) from error
    try:
        reader = gguf.GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the package raises what numpy does for a file that is cut short
        raise ModelError(f"cannot be read as GGUF: {error}", where=str(path), remedy=_AGAIN) from error
    if (parts := fields.get("split.count") or 0) > 1:
        raise ModelError(
            f"is one of {parts} parts", where=str(path), remedy="Join them: llama-gguf-split --merge FIRST WHOLE.gguf"
        )
    with config_values.reading(str(path)):
        raw = _configuration(fields, {one.name for one in reader.tensors}, str(path))
    raw["vocab_size"] = next((int(one.shape[1]) for one in reader.tensors if one.name == "token_embd.weight"), 0)
    spec = _with_frequencies(config.spec_of(raw, where=str(path)), reader.tensors, str(path))
    tensors = GgufTensors(list(reader.tensors), raw, str(path))
    found, size = digests.of_path(path)
    return Decoder(
        spec=spec,
        weights=NamedWeights(tensors, spec, where=str(path)),
        text=gguf_text.text_of(fields, str(path)),
        source_digest=found,
        size_bytes=size,
        parameters=tensors.parameters,
    )


def _with_frequencies(spec: DecoderSpec, tensors: list[Any], where: str) -> DecoderSpec:
    """Return the specification with the table of divisors in which llama.cpp stores Llama 3's rope scaling."""
    table = next((one for one in tensors if one.name == _FREQUENCIES), None)
    if table is None:
        return spec
    divisors = tuple(np.asarray(table.data, np.float64).ravel().tolist())
    pairs = layout.turning_channels(spec) // 2
    if len(divisors) != pairs or not all(divisor > 0 for divisor in divisors):
        raise ModelError(
            f"{_FREQUENCIES} holds {len(divisors)} divisors for {pairs} pairs of channels", where=where, remedy=_AGAIN
        )

    def scaled(kind: LayerKind) -> LayerKind:
        return kind if kind.rotary is None else replace(kind, rotary=replace(kind.rotary, divisors=divisors))

    return replace(spec, layers=tuple(scaled(kind) for kind in spec.layers))


def _configuration(fields: dict[str, Any], tensors: set[str], where: str) -> dict[str, Any]:
    """Return the header as the equivalent ``config.json``."""
    architecture = fields.get("general.architecture")
    if architecture not in _FAMILIES:
        raise ModelError(
            f"general.architecture {architecture!r} is not read",
            where=where,
            remedy=f"Known are {', '.join(_FAMILIES)}; give the Hugging Face folder of others",
        )

    def value(key: str, default: Any = None) -> Any:
        return fields.get(f"{architecture}.{key}", default)

    if value("expert_count"):
        raise ModelError(f"{architecture}.expert_count = {value('expert_count')} is not supported", where=where)
    needed = ("embedding_length", "feed_forward_length", "attention.head_count", "block_count", "context_length")
    for key in needed:
        if value(key) is None:
            raise ModelError(f"the key {architecture}.{key} is missing", where=where, remedy=_AGAIN)
    heads = int(value("attention.head_count"))
    head_size = int(value("attention.key_length") or value("embedding_length") // heads)
    raw: dict[str, Any] = {
        "model_type": _FAMILIES[architecture],
        "hidden_size": value("embedding_length"),
        "intermediate_size": value("feed_forward_length"),
        "num_hidden_layers": value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": value("attention.head_count_kv", heads),
        "head_dim": head_size,
        "max_position_embeddings": value("context_length"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_theta": value("rope.freq_base", 10000.0),
        "partial_rotary_factor": value("rope.dimension_count", head_size) / head_size,
        "hidden_act": "gelu_pytorch_tanh" if architecture == "gemma3" else "silu",
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    if (scaling := value("rope.scaling.type", "none")) not in ("none", None):
        raw["rope_scaling"] = {"rope_type": scaling, "factor": value("rope.scaling.factor", 1.0)}
    if architecture == "gemma3":
        raw |= {"sliding_window": value("attention.sliding_window"), "query_pre_attn_scalar": head_size}
    return raw
