"""JSON documents and their typed views.

Bytes are identity: a received document is kept as the bytes that came and is never serialized anew. Parsing makes
a *view*: a frozen dataclass with the fields this version knows; unknown fields stay in the bytes. Types are checked
strictly (no ``"5"`` for ``5``). What users write by hand (TOML) is read with ``strict=True``: there an unknown key
is an error.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import cattrs
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override
from cattrs.v import format_exception

from kedge_protocol.errors import ConfigError, KedgeError, MessageError

T = TypeVar("T")

MAX_DOCUMENT_BYTES = 16 * 1024 * 1024
"""No JSON document of Kedge is larger (bytes)."""


def named(json_name: str, **options: Any) -> Any:
    """A dataclass field whose name in JSON differs (``media_type`` / ``mediaType``)."""
    return dataclasses.field(metadata={"json": json_name}, **options)


def _exactly(*kinds: type) -> Callable[[Any, Any], Any]:
    def structure(value: Any, cls: Any) -> Any:
        # An enumeration of strings arrives here too, being a str.
        if isinstance(cls, type) and issubclass(cls, enum.Enum):
            return cls(value)
        # bool is an int to Python, not to a reader of JSON.
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise ValueError(f"{value!r} is a {type(value).__name__}, not a {kinds[0].__name__}")
        return kinds[0](value)

    return structure


@functools.cache
def _converter(strict: bool) -> cattrs.Converter:
    converter = cattrs.Converter(forbid_extra_keys=strict)
    converter.register_structure_hook(str, _exactly(str))
    converter.register_structure_hook(bool, _exactly(bool))
    converter.register_structure_hook(int, _exactly(int))
    converter.register_structure_hook(float, _exactly(float, int))

    def renames(cls: type) -> dict[str, Any]:
        return {
            field.name: override(rename=field.metadata["json"])
            for field in dataclasses.fields(cls)
            if "json" in field.metadata
        }

    def is_dataclass(cls: Any) -> bool:
        return isinstance(cls, type) and dataclasses.is_dataclass(cls)

    def structure_factory(cls: type) -> Any:
        return make_dict_structure_fn(cls, converter, _cattrs_forbid_extra_keys=strict, **renames(cls))

    def unstructure_factory(cls: type) -> Any:
        inner: Callable[[Any], dict[str, Any]] = make_dict_unstructure_fn(cls, converter, **renames(cls))
        return lambda value: {key: item for key, item in inner(value).items() if item is not None}

    converter.register_structure_hook_factory(is_dataclass, structure_factory)
    converter.register_unstructure_hook_factory(is_dataclass, unstructure_factory)
    return converter


def structure(data: Any, cls: type[T], *, where: str, strict: bool = False) -> T:
    """Make a typed view of plain data.

    Raises:
        ConfigError: with ``strict``, else :class:`MessageError`; the message names each bad field.
    """
    try:
        return _converter(strict).structure(data, cls)
    except KedgeError:
        raise
    except Exception as error:
        details = "; ".join(cattrs.transform_error(error, path=cls.__name__, format_exception=_told))
        kind = ConfigError if strict else MessageError
        raise kind(details, where=where, remedy="Correct the named fields") from error


def unstructure(value: Any) -> Any:
    """Plain data of a view: dicts, lists, strings and numbers; fields that are None are left out."""
    return _converter(False).unstructure(value)


def _told(error: BaseException, kind: type | None) -> str:
    # cattrs says only which type was expected; what came in its place helps the reader more.
    return str(error) if isinstance(error, ValueError) else format_exception(error, kind)


def encode(value: Any) -> bytes:
    """Serialize something new: canonical JSON (sorted keys, no white space, UTF-8), so that equal values have equal
    digests. Never used on what was received."""
    plain = unstructure(value)
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def loads(raw: bytes, *, where: str) -> Any:
    """Parse JSON bytes.

    Raises:
        MessageError: not JSON, or larger than :data:`MAX_DOCUMENT_BYTES`.
    """
    if len(raw) > MAX_DOCUMENT_BYTES:
        raise MessageError(f"a document of {len(raw)} bytes is over the limit", where=where)
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"not JSON: {error}", where=where) from error


def decode(raw: bytes, cls: type[T], *, where: str) -> T:
    """The typed view of received JSON bytes.

    Raises:
        MessageError: not JSON, or a field that is missing or of the wrong type.
    """
    data = loads(raw, where=where)
    if not isinstance(data, Mapping):
        raise MessageError(f"an object was expected, not a {type(data).__name__}", where=where)
    return structure(data, cls, where=where)
