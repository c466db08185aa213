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

_KINDS = {Item.PICTURE: PICTURE_ENDINGS, Item.SOUND: SOUND_ENDINGS}
_SEVERAL = 2


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
    table = tables.table_of(folder, role)
    if table is not None and not columns.is_columns(table):
        return tables.read(table, where=where)
    split = _split_of(folder, role, where)
    return _plain(folder, role, where) if split is None else _folder(split, role, where, None)


def _split_of(folder: Path, role: str, where: str) -> Path | None:
    """Return the folder of a role's items (``val``, ``Test``); None where a folder is not divided. Folders beside one
    role's mean that ``train`` is a class, as buses and cars are.

    Raises:
        DatasetError: it holds the other role's folder alone.
    """
    inner = {one.name.lower(): one for one in class_folders.class_folders(folder)}
    found = {kind: next((inner[name] for name in names if name in inner), None) for kind, names in _SPLITS.items()}
    divided = all(found.values()) or not set(inner) - {name for names in _SPLITS.values() for name in names}
    if not divided or not any(found.values()):
        return None
    if found[role] is None:
        have, want = ", ".join(one.name for one in found.values() if one), ", ".join(_SPLITS[role])
        raise DatasetError(
            f"holds {have}, and none of {want}", where=where, remedy=f"Name another folder for the {role}"
        )
    return found[role]


def _plain(folder: Path, role: str, where: str) -> Listing:
    place = folder / "images" if (folder / "images").is_dir() else folder
    pictures, sounds = endings(folder, PICTURE_ENDINGS), endings(folder, SOUND_ENDINGS)
    if (place is not folder or pictures) and yolo.labels_folder(place) is not None:
        return yolo.read_folder(_split_of(place, role, where) or place, where=where)
    folders = class_folders.class_folders(folder)
    classes = next(
        (item for item, kinds in _KINDS.items() if any(endings(one, kinds, deep=True) for one in folders)), None
    )
    table = tables.table_in(folder, role)
    if table is not None and _is_of_items(table, pictures or sounds, len(folders) if classes else 0):
        return tables.read(table, where=where)
    if pictures and sounds:
        raise DatasetError("holds pictures and sounds", where=where, remedy="Keep them in folders of their own")
    if classes is not None:
        return class_folders.read(folder, classes, where=where)
    if pictures or sounds:
        return class_folders.flat(folder, Item.PICTURE if pictures else Item.SOUND, where=where)
    raise DatasetError(f"holds nothing that is known{_such_as(folder)}", where=where, remedy=FORMS)


def _is_of_items(table: Path, beside: list[Path], classes: int) -> bool:
    """Return whether a folder's table is its data set; lines of text beside files are a read-me, and a table that names
    no files beside classes lists these."""
    if table.suffix.lower() == ".txt":
        return not beside and not classes
    return classes < _SEVERAL or not columns.is_columns(table)


def _such_as(folder: Path) -> str:
    other = next((one.name for one in sorted(folder.rglob("*")) if one.is_file() and one.name[0] != "."), None)
    return "" if other is None else f", its first file is {other}"


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
