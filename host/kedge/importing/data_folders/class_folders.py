"""Reads pictures or sounds in one folder per class (``DIR/cat/1.jpg``), or in one folder without classes."""

from __future__ import annotations

from pathlib import Path

from kedge.importing.data_folders.listing import PICTURE_ENDINGS, SOUND_ENDINGS, Item, Listing, Truth, endings
from kedge_protocol.errors import DatasetError

_ENDINGS = {Item.PICTURE: PICTURE_ENDINGS, Item.SOUND: SOUND_ENDINGS}
_UNREAD = {
    Item.PICTURE: (".gif", ".tif", ".tiff", ".heic", ".avif", ".ppm"),
    Item.SOUND: (".mp3", ".flac", ".ogg", ".m4a", ".aac", ".opus"),
}


def class_folders(folder: Path) -> list[Path]:
    """Return the subfolders that are not hidden, sorted; without what macOS puts beside them into an archive."""
    return sorted(
        one for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".") and one.name != "__MACOSX"
    )


def read(folder: Path, item: Item, *, where: str) -> Listing:
    """List a folder with class folders; the folders' names are the classes, in alphabetical order.

    Raises:
        DatasetError: a class has no file, or files lie beside the class folders.
    """
    sources: list[Path | str] = []
    labels: list[int] = []
    folders = class_folders(folder)
    beside = endings(folder, _ENDINGS[item])
    if beside:
        raise DatasetError(
            f"holds {beside[0].name} beside the class folders {', '.join(one.name for one in folders[:3])}",
            where=where,
            remedy="Put each file into the folder of its class, or all into one folder",
        )
    for number, one in enumerate(folders):
        files = endings(one, _ENDINGS[item], deep=True)
        if not files:
            raise DatasetError(f"the class folder {one.name} holds no {item.value}", where=where)
        sources += files
        labels += [number] * len(files)
    return Listing(
        where=where,
        kind=f"{item.value} in class folders",
        item=item,
        truth=Truth.CLASS,
        sources=sources,
        labels=labels,
        classes=tuple(one.name for one in folders),
        left_out=[file for one in folders for file in endings(one, _UNREAD[item], deep=True)],
    )


def flat(folder: Path, item: Item, *, where: str) -> Listing:
    """List a folder of files without labels."""
    return Listing(
        where=where,
        kind=f"a folder of {item.value}",
        item=item,
        truth=Truth.NOTHING,
        sources=endings(folder, _ENDINGS[item]),
        left_out=endings(folder, _UNREAD[item]),
    )
