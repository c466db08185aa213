"""The user's folders according to the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder(variable: str, default: str) -> Path:
    """Return Kedge's folder in one of the user's base folders.

    Args:
        variable: the environment variable that names the base folder; a relative path in it is ignored, as the
            specification requires.
        default: the base folder below the home folder if the variable does not name one.
    """
    base = Path(os.environ.get(variable, ""))
    return (base if base.is_absolute() else Path.home() / default) / "kedge"


def data_folder() -> Path:
    """Return Kedge's data folder: ``KEDGE_DATA``, else ``XDG_DATA_HOME/kedge``, else ``~/.local/share/kedge``."""
    if own := os.environ.get("KEDGE_DATA"):
        return Path(own).absolute()
    return user_folder("XDG_DATA_HOME", ".local/share")
