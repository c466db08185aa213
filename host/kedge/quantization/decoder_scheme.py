"""How a decoder's weights are stored, and in which order schemes are tried."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from kedge_protocol.errors import ConfigError
from kedge_targets.true_precision import MIXED

PRECISIONS = ("int4", "int8", "float16", "float32")
METHODS = ("gptq", "plain")
CACHES = ("float32", "int8")
_BITS = {"int4": 4, "int8": 8}


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """A way to store a decoder.

    Attributes:
        precision: precision of the layers' matrices.
        group: number of input channels that share a scale.
        symmetric: whether zero-points are fixed, those of the embedding too.
        method: ``gptq`` (rounding errors compensate each other, scales are searched) or ``plain``.
        embedding: precision of the embedding and the head.
        int8_layers: indices of layers whose matrices have 8 bits where ``precision`` has 4.
        cache: precision of stored keys and values; ``int8`` takes a quarter of the bytes.
    """

    precision: str = "int4"
    group: int = 32
    symmetric: bool = False
    method: str = "gptq"
    embedding: str = "int8"
    int8_layers: tuple[int, ...] = ()
    cache: str = "float32"

    @property
    def bits(self) -> int:
        """Return the bits of the layers' codes; 0 if they are float."""
        return _BITS.get(self.precision, 0)

    def bits_of(self, layer: int) -> int:
        """Return the bits of one layer's codes; 0 if they are float."""
        return 8 if self.bits and layer in self.int8_layers else self.bits

    @property
    def fewest_bits(self) -> int:
        """Return the fewest bits that any weight has, scales aside."""
        return min(_BITS.get(one, 32 if one == "float32" else 16) for one in (self.precision, self.embedding))

    @property
    def name(self) -> str:
        """Return the precision that is true of the whole: ``mixed`` if layers differ."""
        return MIXED if self.int8_layers else self.precision

    @property
    def embedding_bits(self) -> int:
        """Return the bits of the embedding's codes; 0 if it is float."""
        return _BITS.get(self.embedding, 0)

    @property
    def learns(self) -> bool:
        """Return whether rounding learns from calibration texts."""
        return bool(self.bits) and self.method == "gptq"

    @property
    def calibrated(self) -> bool:
        """Return whether anything is taken from calibration texts."""
        return self.learns or self.cache == "int8"

    def same_layers(self, other: Scheme) -> bool:
        """Return whether both have the same layers, whatever their embeddings are."""
        return replace(self, embedding=other.embedding) == other

    @property
    def label(self) -> str:
        """Return a readable form: ``int4 g32 gptq, embedding int8``."""
        cache = "" if self.cache == "float32" else f", cache {self.cache}"
        if not self.bits:
            embedding = "" if self.embedding == self.precision else f", embedding {self.embedding}"
            return f"{self.precision}{embedding}{cache}"
        symmetric = " symmetric" if self.symmetric else ""
        count = len(self.int8_layers)
        mixed = f", {count} layer{'s' if count > 1 else ''} int8" if count else ""
        return f"{self.precision} g{self.group}{symmetric} {self.method}{mixed}, embedding {self.embedding}{cache}"


LADDER = (
    Scheme(symmetric=True, embedding="int4"),
    Scheme(symmetric=True),
    Scheme(),
    Scheme(precision="int8", method="plain"),
    Scheme(precision="float16", embedding="float16"),
    Scheme(precision="float32", embedding="float32"),
)
"""Schemes tried until the budget is kept, smallest first. Codes of 4 bits without zero-points lose a little more, and
ONNX Runtime needs 0.86 of the time for a token (AVX2)."""
QUICK = Scheme()
"""The only scheme that is tried in a hurry."""


def parse(text: str, defaults: Scheme | None = None) -> Scheme:
    """Parse a scheme: ``precision=int4,group=32,symmetric=true,method=plain,embedding=int8,int8_layers=0+5``.

    Args:
        defaults: what is not given.

    Raises:
        ConfigError: an option or value is unknown.
    """
    where = "--quantize"
    known = {field.name for field in fields(Scheme)}
    given: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in known:
            raise ConfigError(
                f"{part.strip()!r} is no option of a decoder",
                where=where,
                remedy=f"Known are {', '.join(sorted(known))}",
            )
        given[name] = _value(name, value)
    found = replace(defaults or Scheme(), **given)
    if "embedding" not in given and not found.bits:
        found = replace(found, embedding=found.precision)
    check(found, where=where)
    return found


def check(scheme: Scheme, *, where: str) -> None:
    """Raise :class:`ConfigError` if a value of a scheme is unknown."""
    if scheme.int8_layers and scheme.precision != "int4":
        raise ConfigError(
            f"layers in int8 have no place in {scheme.precision}", where=where, remedy="Leave int8_layers out"
        )
    choices = ((scheme.precision, PRECISIONS), (scheme.embedding, PRECISIONS), (scheme.method, METHODS))
    for value, allowed in (*choices, (scheme.cache, CACHES)):
        if value not in allowed:
            raise ConfigError(f"{value!r} is not known", where=where, remedy=f"Known are {', '.join(allowed)}")
    if scheme.group not in (16, 32, 64, 128, 256):
        raise ConfigError(f"{scheme.group} is no size of a group", where=where, remedy="Give 16, 32, 64, 128 or 256")


def _value(name: str, value: str) -> Any:
    if name == "int8_layers":
        parts = value.split("+")
        if not all(part.isdigit() for part in parts):
            raise ConfigError(
                f"{value!r} are no layers", where="--quantize", remedy="Give their indices from 0 on, as in 0+5"
            )
        return tuple(sorted(set(map(int, parts))))
    if name == "group":
        return int(value) if value.isdigit() else 0
    return value.lower() in ("true", "yes", "1") if name == "symmetric" else value
