"""The environment of every child: vendors' telemetry off, vendors' files in a temporary folder.

Each backend's package declares the variables of its own vendors (``environment`` in ``backends/<name>/__init__.py``);
all are set, because a child may load any backend.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kedge_protocol import folders
from kedge_protocol.errors import TargetError
from kedge_targets import backend_packages

# General opt-outs, honoured by many packages.
_GENERAL = {"DO_NOT_TRACK": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1", "PYTHONHASHSEED": "0"}

# What would make another Python import this one's packages, or compile its own anew at each start: a toolchain's
# environment is Kedge's, its bytecode belongs there.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONUSERBASE", "PYTHONDONTWRITEBYTECODE")


@functools.cache
def _declared() -> Mapping[str, str]:
    """Return the variables that the backends declare, merged."""
    merged: dict[str, str] = {}
    for name in backend_packages.names():
        # One that cannot be loaded is an error where it is used.
        with contextlib.suppress(TargetError):
            merged |= getattr(backend_packages.load(name), "environment", {})
    return merged


LOG_VARIABLE = "KEDGE_LOG_DIR"


def log_dir(given: Path | None) -> Path:
    """Return the folder for logs: the given one, the environment's, or the system's temporary folder."""
    return given or Path(os.environ.get(LOG_VARIABLE) or tempfile.gettempdir())


CACHE_VARIABLE = "KEDGE_CACHE"


def cache_dir() -> Path:
    """Return the folder for what this device builds for itself: the environment's, or the user's cache folder."""
    if given := os.environ.get(CACHE_VARIABLE):
        return Path(given)
    return folders.user_folder("XDG_CACHE_HOME", ".cache")


def of_child(scratch: Path, logs: Path, python: Path | None, extra: Mapping[str, str] | None) -> dict[str, str]:
    """Return the complete environment of a child.

    Args:
        scratch: the folder for caches and temporary files.
        logs: the folder for logs of workers that the child starts; these outlive ``scratch``.
        python: the child's interpreter; one other than this must not see this one's packages.
        extra: the caller's own variables, which take precedence.
    """
    made = dict(os.environ)
    if python is not None and python != Path(sys.executable):
        for name in _FOREIGN:
            made.pop(name, None)
        made["PYTHONNOUSERSITE"] = "1"
    made |= _GENERAL
    made |= _declared()
    made |= {
        LOG_VARIABLE: str(logs),
        # Resolved here: the child's own cache folder goes with it.
        CACHE_VARIABLE: str(cache_dir()),
        "TMPDIR": str(scratch),
        "XDG_CACHE_HOME": str(scratch / "cache"),
        "XDG_CONFIG_HOME": str(scratch / "config"),
        "MPLCONFIGDIR": str(scratch / "matplotlib"),
    }
    made |= extra or {}
    return made
