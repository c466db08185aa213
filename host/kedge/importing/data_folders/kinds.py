"""Recognizes the format of a data set by the files at its path."""

from __future__ import annotations

from pathlib import Path

from kedge.importing.data_folders import class_folders, coco, columns, tables, yolo
from kedge.importing.data_folders.listing import PICTURE_ENDINGS, SOUND_ENDINGS, Item, Listing, endings
from kedge_protocol.errors import DatasetError

FORMS = (
    "Give an .npz, a folder of .npy files, pictures or wav files in class folders, a COCO JSON or data.yaml, "
    "a CSV with a column of files or texts, or with the model's own inputs as columns, or lines of text (.txt, .jsonl)"
)
_SPLITS = {"calibration": ("train", "training"), "evaluation": ("val", "valid", "validation", "eval", "test")}


def is_raw(path: Path) -> bool:
    """Return whether a path holds something other than arrays, so that a pipeline must make arrays of it."""
    if path.is_dir():
        return not any(path.glob("*.npy"))
    return path.suffix.lower() in (*tables.TABLES, *tables.LINES, ".json", ".yaml", ".yml")


def columns_file(path: Path, role: str) -> Path | None:
    """Return the table, or lines of text, whose columns may be the model's own inputs; None where something else lies
    there."""
    if path.is_dir():
        items = endings(path, (*PICTURE_ENDINGS, *SOUND_ENDINGS, ".npy", ".yaml", ".yml", ".json"))
        table = None if items else tables.table_in(path, role)
        if table is None or table.suffix.lower() not in tables.TABLES:
            return None
        path = table
    return path if columns.is_columns(path) else None


def listed(path: Path, role: str, *, annotations: Path | None = None) -> Listing:
    """List a data set in whichever format is recognized.

    Args:
        role: ``calibration`` or ``evaluation``: selects between ``train`` and ``val`` if both exist.
        annotations: COCO JSON, or a folder of YOLO text files, for a folder of pictures.

    Raises:
        DatasetError: the path does not exist, the format is unknown, or the data is invalid; the message names file
            and line.
    """
    where = f"{role} {path}"
    if not path.exists():
        raise DatasetError("is neither a file nor a folder", where=where)
    found = _file(path, role, where) if path.is_file() else _folder(path, role, where, annotations)
    if not found.sources:
        raise DatasetError(f"holds no {found.item.value}", where=where, remedy=FORMS)
    return found


def _file(path: Path, role: str, where: str) -> Listing:
    if yolo.yaml_file(path) is not None:
        return yolo.read_yaml(path, role, where=where)
    if path.suffix.lower() in (*tables.TABLES, *tables.LINES):
        return tables.read(path, where=where)
    if path.suffix.lower() == ".json":
        return coco.read(path, path.parent, where=where)
    raise DatasetError(f"{path.name} is no data set that is known", where=where, remedy=FORMS)


def _folder(folder: Path, role: str, where: str, annotations: Path | None) -> Listing:
    if annotations is not None and annotations.suffix.lower() == ".json":
        return coco.read(annotations, folder, where=where)
    if annotations is not None and annotations.is_dir():
        return yolo.read_folder(folder, where=where, labels=annotations)
    file = yolo.yaml_file(folder)
    if file is not None:
        return yolo.read_yaml(file, role, where=where)
    annotated = coco.found_in(folder)
    if annotated:
        return coco.read(_split(annotated, role, where), folder, where=where)
    split = next((folder / name for name in _SPLITS[role] if (folder / name).is_dir()), None)
    if split is not None and split.name != "images":
        return _folder(split, role, where, None)
    return _plain(folder, role, where)


def _plain(folder: Path, role: str, where: str) -> Listing:
    inner = folder / "images"
    pictures = endings(folder, PICTURE_ENDINGS)
    if (inner.is_dir() or pictures) and yolo.labels_folder(inner if inner.is_dir() else folder) is not None:
        return yolo.read_folder(folder, where=where)
    table = tables.table_in(folder, role)
    if table is not None:
        return tables.read(table, where=where)
    sounds = endings(folder, SOUND_ENDINGS)
    if pictures and sounds:
        raise DatasetError("holds pictures and sounds", where=where, remedy="Keep them in folders of their own")
    folders = class_folders.class_folders(folder)
    for item, kinds, flat in ((Item.PICTURE, PICTURE_ENDINGS, pictures), (Item.SOUND, SOUND_ENDINGS, sounds)):
        if any(endings(one, kinds, deep=True) for one in folders):
            return class_folders.read(folder, item, where=where)
        if flat:
            return class_folders.flat(folder, item, where=where)
    raise DatasetError("holds nothing that is known", where=where, remedy=FORMS)


def _split(files: list[Path], role: str, where: str) -> Path:
    if len(files) == 1:
        return files[0]
    named = [file for name in _SPLITS[role] for file in files if name in file.stem.lower()]
    boxes = [file for file in named if "instances" in file.stem] or named
    if len(boxes) != 1:
        raise DatasetError(
            f"holds several COCO files: {', '.join(file.name for file in files[:4])}",
            where=where,
            remedy="Name one of them",
        )
    return boxes[0]
