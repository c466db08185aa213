"""Writes a model as ``.xml`` and ``.bin`` with the same bytes each time.

OpenVINO names what its passes add by a per-process counter (``Convert_7543``), and writes its version, NNCF's options
and indentation in addition to the graph. No runtime reads any of this.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from kedge_protocol.errors import StorageError
from kedge_targets.backends.openvino import library

ENTRY = "model.xml"
WEIGHTS = "model.bin"

_COUNTED = re.compile(r"^(\w+?)_\d+$")


def save(model: Any, folder: Path, *, half: bool, names: Collection[str]) -> dict[str, Path]:
    """Write a model.

    Args:
        model: an ``openvino.Model``; what its passes added is renamed.
        half: store weights as float16.
        names: names of the trained model's nodes and tensors; these are kept.

    Returns:
        title → path of the two files.

    Raises:
        StorageError: the disk is full or not writable.
    """
    rename(model, frozenset(names))
    entry, weights = folder / ENTRY, folder / WEIGHTS
    library.load().save_model(model, str(entry), compress_to_fp16=half)
    try:
        entry.write_bytes(lean(entry.read_bytes()))
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(entry)) from error
    return {ENTRY: entry, WEIGHTS: weights}


def rename(model: Any, kept: frozenset[str]) -> None:
    """Rename nodes and tensors independently of what else the process did, in place; the names ``kept`` stay."""
    model.set_friendly_name("model")
    operations = model.get_ordered_ops()
    used = {operation.get_friendly_name() for operation in operations}
    for index, operation in enumerate(operations):
        name = operation.get_friendly_name()
        if name in kept or not _COUNTED.match(name):
            continue
        fresh = f"{operation.get_type_name()}.{index}"
        while fresh in used:
            fresh += "+"
        used.add(fresh)
        operation.set_friendly_name(fresh)


def lean(raw: bytes) -> bytes:
    """Return a representation without what no runtime reads."""
    root = ElementTree.fromstring(raw)
    # Layers have information of their own, which stays.
    for information in root.findall("rt_info"):
        root.remove(information)
    for element in root.iter():
        if element.text is not None and not element.text.strip():
            element.text = None
        element.tail = None
    made: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return made
