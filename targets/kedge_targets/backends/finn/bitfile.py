"""Handles a finished bitfile from the user, and its driver's settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ConfigError, LoweringError, StorageError

BIT, HWH = "finn-accel.bit", "finn-accel.hwh"
SETTINGS = "settings.json"
_SAME = ("idt", "odt", "ishape_normal", "oshape_normal")


def settings_for(path: Path, expected: Mapping[str, Any]) -> dict[str, Any]:
    """Return the driver's settings for a bitfile: ``settings.json`` of FINN's deployment package if it lies beside the
    bitfile, else those that this graph and folding would have.

    Args:
        path: path of the ``.bit`` file.
        expected: settings from the toolchain.

    Raises:
        ConfigError: the file, or the ``.hwh`` beside it, is missing or unreadable.
        LoweringError: it was built from another model.
    """
    for file in (path, path.with_suffix(".hwh")):
        if not file.is_file():
            raise ConfigError(
                "there is no such file", where=str(file), remedy="Give the .bit file with its .hwh file beside it"
            )
    own = path.with_name(SETTINGS)
    if not own.is_file():
        return dict(expected)
    try:
        found = json.loads(own.read_text(encoding="utf-8"))
        shapes = found["driver_information"]["io_shape_dict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"is not the settings of FINN's driver: {error}",
            where=str(own),
            remedy="Take it from FINN's deployment package, or take it away",
        ) from error
    wanted = expected["driver_information"]["io_shape_dict"]
    for name in _SAME:
        if shapes.get(name) != wanted[name]:
            raise LoweringError(
                f"the bitfile was built of another model: its {name} is {shapes.get(name)}, this model's is "
                f"{wanted[name]}",
                where=str(path),
                remedy="Build the bitfile of the bundle's own files (build.sh in the bundle)",
            )
    return dict(found)


def copied(path: Path, folder: Path) -> dict[str, Path]:
    """Return title → copy of the bitfile and its hardware description.

    Raises:
        StorageError: the files cannot be copied.
    """
    files = {BIT: folder / BIT, HWH: folder / HWH}
    try:
        shutil.copyfile(path, files[BIT])
        shutil.copyfile(path.with_suffix(".hwh"), files[HWH])
    except OSError as error:
        raise StorageError(f"cannot be copied: {error.strerror}", where=str(path)) from error
    return files
