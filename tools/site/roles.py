"""Griffe's extension: docstrings as mkdocstrings reads them (Sphinx roles become code, shared entries one each)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from griffe import Extension, Object

sys.path.insert(0, str(Path(__file__).parent))

import tables


class Roles(Extension):
    """Rewrites each docstring once."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Griffe's: an object was read."""
        if obj.docstring is not None:
            obj.docstring.value = tables.plain(tables.one_name_each(obj.docstring.value))
