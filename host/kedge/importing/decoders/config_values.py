"""The values of a ``config.json``: what is wrong with one is an error that names its key."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from kedge_protocol.errors import ModelError


def check_neutral(config: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]], *, where: str) -> None:
    """Check that keys that would change the function have neutral values.

    Raises:
        ModelError: one has another.
    """
    for key, values in neutral.items():
        if key in config and config[key] not in values:
            raise ModelError(
                f"{key} = {json.dumps(config[key], default=str)[:80]} is not supported",
                where=where,
                remedy="Use a model without it, or export this one to ONNX",
            )


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what a missing key, a value of another type or a 0 raises into a :class:`ModelError`."""
    try:
        yield
    except KeyError as error:
        raise ModelError(f"the key {error.args[0]!r} is missing", where=where) from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"a value is not of its key's type: {error}", where=where) from error
    except ZeroDivisionError as error:
        raise ModelError("a size is 0", where=where, remedy="Give the folder as it was published") from error


def activation(name: Any, known: Mapping[str, str], *, where: str) -> str:
    """Return Kedge's name of an activation.

    Raises:
        ModelError: it is not known.
    """
    if name not in known:
        raise ModelError(f"the activation {name!r} is not known", where=where, remedy=f"Known are {', '.join(known)}")
    return known[name]
