"""Maps Hugging Face's tensor names to :class:`kedge_targets.decoder.spec.Weights`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kedge_protocol.errors import ModelError
from kedge_targets.decoder.spec import DecoderSpec

Array = npt.NDArray[Any]

_LAYER = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "feed_forward_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_GEMMA = {
    **_LAYER,
    "attention_post_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_post_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attention_norm": "ln_1",
    "o": "attn.c_proj",
    "feed_forward_norm": "ln_2",
    "up": "mlp.c_fc",
    "down": "mlp.c_proj",
}
_OUTER = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_GPT2_OUTER = {
    "embedding": "wte.weight",
    "positions": "wpe.weight",
    "norm": "ln_f.weight",
    "norm.bias": "ln_f.bias",
    "head": "lm_head.weight",
}
# Constants that some exporters store; each follows from the configuration.
_BUFFERS = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias)")


class Reader(Protocol):
    """Named tensors as float32, read one at a time."""

    @property
    def names(self) -> set[str]:
        """Return the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""

    def read(self, name: str) -> Array:
        """Return one tensor."""


class NamedWeights:
    """The weights of one decoder.

    Raises:
        ModelError: a tensor is missing, has another shape than the configuration says, or is unknown.
    """

    def __init__(self, tensors: Reader, spec: DecoderSpec, *, where: str) -> None:
        self._tensors = tensors
        self._spec = spec
        self._where = where
        self._gpt2 = spec.architecture == "gpt2"
        self._prefix = self._found_prefix()
        self._check()

    def outer(self, name: str) -> Array:
        """See :meth:`kedge_targets.decoder.spec.Weights.outer`."""
        return self._tensors.read(_outer_name(self._spec, name, self._prefix))

    def has_bias(self, name: str) -> bool:
        """Return whether ``name.bias``, a tensor outside the layers, is stored."""
        return self._gpt2 and f"{name}.bias" in _GPT2_OUTER

    def layer(self, index: int) -> dict[str, Array]:
        """See :meth:`kedge_targets.decoder.spec.Weights.layer`."""
        if self._gpt2:
            return self._gpt2_layer(index)
        found = self._stored(index)
        if self._spec.architecture == "phi3":
            self._split(found, index)
        return {
            name: self._tensors.read(stored) if isinstance(stored, str) else stored for name, stored in found.items()
        }

    def _stored(self, index: int) -> dict[str, Any]:
        """Return own name → name in the file of the tensors that exist."""
        table = _GEMMA if self._spec.post_norms else _GPT2 if self._gpt2 else _LAYER
        found: dict[str, Any] = {}
        for own, stored in table.items():
            for suffix, part in (("", "weight"), (".bias", "bias")):
                name = f"{self._prefix}{'h' if self._gpt2 else 'layers'}.{index}.{stored}.{part}"
                if name in self._tensors.names:
                    found[own + suffix] = name
        return found

    def _split(self, found: dict[str, Any], index: int) -> None:
        """Split Phi-3's matrices, which combine projections of one input."""
        spec, base = self._spec, f"{self._prefix}layers.{index}."
        whole = self._tensors.read(f"{base}self_attn.qkv_proj.weight")
        queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
        found["q"], found["k"], found["v"] = np.split(whole, [queries, queries + keys])
        found["gate"], found["up"] = np.split(self._tensors.read(f"{base}mlp.gate_up_proj.weight"), 2)

    def _gpt2_layer(self, index: int) -> dict[str, Array]:
        """Read a layer of GPT-2, whose "Conv1D" stores matrices as [in, out], and queries, keys and values as one."""
        found = {name: self._tensors.read(stored) for name, stored in self._stored(index).items()}
        for name in ("o", "up", "down"):
            found[name] = np.ascontiguousarray(found[name].T)
        base = f"{self._prefix}h.{index}.attn.c_attn"
        whole, bias = self._tensors.read(f"{base}.weight").T, self._tensors.read(f"{base}.bias")
        for name, part, one in zip("qkv", np.split(whole, 3), np.split(bias, 3), strict=True):
            found[name], found[f"{name}.bias"] = np.ascontiguousarray(part), one
        return found

    def _found_prefix(self) -> str:
        if not self._gpt2:
            return "model."
        return "transformer." if "transformer.wte.weight" in self._tensors.names else ""

    def _check(self) -> None:
        """Check that exactly the tensors that the specification needs exist, each in its shape."""
        expected = expected_shapes(self._spec, prefix=self._prefix)
        check_shapes(self._tensors, expected, where=self._where)
        known = set(expected)
        for index in range(len(self._spec.layers)):
            known |= set(self._stored(index).values())
        if self._spec.tied:
            known.add("lm_head.weight")
        extra = sorted(name for name in self._tensors.names - known if not _BUFFERS.fullmatch(name))
        if extra:
            raise ModelError(
                f"holds the tensor {extra[0]!r}, which no {self._spec.architecture} has",
                where=self._where,
                remedy="Only plain decoders are read; export others to ONNX",
            )


def expected_shapes(spec: DecoderSpec, *, prefix: str | None = None) -> dict[str, tuple[int, ...]]:
    """Return name in the file → shape of every tensor that a decoder must have, without optional biases.

    Args:
        prefix: prefix of all names but the head's; None for the usual one.
    """
    gpt2 = spec.architecture == "gpt2"
    if prefix is None:
        prefix = "transformer." if gpt2 else "model."
    outer = {"embedding": (spec.vocabulary, spec.hidden), "norm": (spec.hidden,)}
    if not spec.tied:
        outer["head"] = (spec.vocabulary, spec.hidden)
    if spec.learned_positions:
        outer |= {"positions": (spec.context, spec.hidden), "norm.bias": (spec.hidden,)}
    found: dict[str, tuple[int, ...]] = {_outer_name(spec, name, prefix): shape for name, shape in outer.items()}
    for index in range(len(spec.layers)):
        base = f"{prefix}{'h' if gpt2 else 'layers'}.{index}."
        found |= {f"{base}{name}": shape for name, shape in (_gpt2_shapes(spec) if gpt2 else _shapes(spec)).items()}
    return found


def _outer_name(spec: DecoderSpec, name: str, prefix: str) -> str:
    if spec.architecture != "gpt2":
        return _OUTER[name]
    return _GPT2_OUTER[name] if name == "head" else prefix + _GPT2_OUTER[name]


def _shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner = spec.hidden, spec.intermediate
    queries, keys = spec.heads * spec.head_size, spec.kv_heads * spec.head_size
    table = _GEMMA if spec.post_norms else _LAYER
    found: dict[str, tuple[int, ...]] = {
        f"{stored}.weight": (hidden,) for own, stored in table.items() if "norm" in own
    }
    for name in ("q_norm", "k_norm"):
        found.pop(f"{_LAYER[name]}.weight", None)
        if spec.qk_norm:
            found[f"{_LAYER[name]}.weight"] = (spec.head_size,)
    if spec.architecture == "phi3":
        found |= {
            "self_attn.qkv_proj.weight": (queries + 2 * keys, hidden),
            "mlp.gate_up_proj.weight": (2 * inner, hidden),
        }
    else:
        found |= {
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
        }
    return found | {"self_attn.o_proj.weight": (hidden, queries), "mlp.down_proj.weight": (hidden, inner)}


def _gpt2_shapes(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    hidden, inner = spec.hidden, spec.intermediate
    found: dict[str, tuple[int, ...]] = {
        f"{name}.{part}": (hidden,) for name in ("ln_1", "ln_2") for part in ("weight", "bias")
    }
    sizes = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden)}
    sizes |= {"mlp.c_fc": (hidden, inner), "mlp.c_proj": (inner, hidden)}
    for name, (rows, columns) in sizes.items():
        found |= {f"{name}.weight": (rows, columns), f"{name}.bias": (columns,)}
    return found


def check_shapes(tensors: Reader, expected: Mapping[str, tuple[int, ...]], *, where: str) -> None:
    """Check that the tensors that a specification needs exist, each in its shape.

    Raises:
        ModelError: one is missing, or has another shape.
    """
    for name, shape in expected.items():
        if name not in tensors.names:
            raise ModelError(
                f"has no tensor {name!r}", where=where, remedy="config.json and the weights belong together"
            )
        there = tensors.shape(name)
        if there != shape:
            raise ModelError(f"the tensor {name!r} is {list(there)}, config.json says {list(shape)}", where=where)
