"""Kedge compiles trained models for a fleet of different edge devices, rolls them out, and keeps them running well.

The public interface::

    import kedge

    release = kedge.compile("model.onnx", name="digits", version="1.0", targets=["rpi4"],
                            calibration="calib.npz", evaluation="eval.npz", out="OUT")

Everything is imported when it is first used: a controller needs no compiler.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kedge_protocol import __version__

if TYPE_CHECKING:
    from kedge.compiler.api import compile  # noqa: A004 -- the public name
    from kedge.compiler.release import Release
    from kedge_protocol import errors
    from kedge_protocol.errors import KedgeError

__all__ = ["KedgeError", "Release", "__version__", "compile", "errors"]

_PUBLIC = {
    "compile": ("kedge.compiler.api", "compile"),
    "Release": ("kedge.compiler.release", "Release"),
    "KedgeError": ("kedge_protocol.errors", "KedgeError"),
    "errors": ("kedge_protocol.errors", None),
}


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kedge' has no attribute {name!r}")
    path, attribute = _PUBLIC[name]
    module = importlib.import_module(path)
    return module if attribute is None else getattr(module, attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
