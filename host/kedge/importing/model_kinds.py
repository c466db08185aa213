"""Recognizes the kind of a user's ``MODEL`` by its name and, for a folder, by its files; nothing is loaded."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass
from pathlib import Path

from kedge.importing import pickled
from kedge_protocol.errors import ModelError
from kedge_targets import registry
from kedge_targets.importer import Importer


class Kind(str, enum.Enum):
    """The kinds that Kedge itself reads; the backends' importers read the others."""

    ONNX = "ONNX"
    FACTORY = "PyTorch module"
    EXPORTED = "PyTorch exported program"
    KERAS = "Keras model"
    PICKLED = "pickled model"
    TRANSFORMERS = "Hugging Face folder"
    UNKNOWN = "unknown"  # of no suffix that tells: it may be ONNX all the same


@dataclass(frozen=True)
class Factory:
    """A factory ``where:name``: a function without arguments in a file or a module."""

    where: str
    name: str

    @property
    def file(self) -> Path | None:
        """The file; None for a module given by its dotted name."""
        return Path(self.where) if self.where.endswith(".py") else None


_FACTORY = re.compile(r"(?P<where>.*\.py|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):(?P<name>[A-Za-z_]\w*)")

_SUFFIXES = {".onnx": Kind.ONNX, ".pt2": Kind.EXPORTED, ".keras": Kind.KERAS}

_KERAS = "Load it where it was made and save it as .keras (model.save('model.keras'))"
_PICKLE = ("is a pickle, which may run any code when it is read", f"{pickled.FACTORY}; {pickled.TRUST}")
_OLD_KERAS = ("is Keras's old format, which may hold code that runs when it is read", f"{_KERAS}; {pickled.TRUST}")
_REFUSED = {
    **dict.fromkeys((*pickled.TORCH, *pickled.PLAIN), _PICKLE),
    ".safetensors": ("holds weights without a network", pickled.FACTORY),
    ".py": ("is a Python file without a function's name", "Give FILE.py:FACTORY"),
    ".h5": _OLD_KERAS,
    ".hdf5": _OLD_KERAS,
    ".pb": ("is a bare TensorFlow graph", "Give the SavedModel folder that it lies in"),
}
_TRUSTED = {
    **dict.fromkeys((*pickled.TORCH, *pickled.PLAIN), Kind.PICKLED),
    ".h5": Kind.KERAS,
    ".hdf5": Kind.KERAS,
}
"""Suffixes of files that are read only if the user trusts them → their kind."""


def factory(source: str) -> Factory | None:
    """Return the factory that a source names, or None if it is a path."""
    found = _FACTORY.fullmatch(source)
    if found is None or Path(source).exists():
        return None
    return Factory(found["where"], found["name"])


def absolute(source: str) -> str:
    """Return the source with an absolute path: the worker's child process has another current folder."""
    named = factory(source)
    if named is None:
        return str(Path(source).absolute())
    return source if named.file is None else f"{named.file.absolute()}:{named.name}"


def recognise(source: str, *, trust_pickle: bool = False) -> Kind | Importer:
    """Return the kind of a source, or the importer that reads it.

    Args:
        trust_pickle: whether the user trusts a file that may run code when it is read.

    Raises:
        ModelError: the source does not exist or its kind cannot be read; the remedy says what to give.
    """
    if (named := factory(source)) is not None:
        if named.file is not None and not named.file.is_file():
            raise ModelError("there is no such file", where=str(named.file), remedy="Give FILE.py:FACTORY")
        return Kind.FACTORY
    path = Path(source)
    if not path.exists():
        raise ModelError("there is no such file", where=source, remedy=f"Kedge reads {readable()}")
    for importer in registry.importers():
        if importer.kind(path) is not None:
            return importer
    if path.is_dir() and (path / "config.json").is_file():
        return Kind.TRANSFORMERS
    if path.is_dir() and (path / "adapter_config.json").is_file():
        remedy = f"Give the model that it was trained on, and --adapter {path}"
        raise ModelError("is an adapter without its model", where=source, remedy=remedy)
    if path.is_dir() and any(path.glob("*.safetensors")):
        raise ModelError("holds weights and no config.json", where=source, remedy="Fetch the folder again")
    if path.is_dir():
        raise ModelError("is a folder, and none that can be read", where=source, remedy=_within(path))
    suffix = path.suffix.lower()
    if pickled.is_ultralytics(path):
        if not trust_pickle:
            raise pickled.ultralytics(source)
        from kedge_targets.ultralytics.importer import Importer as Ultralytics

        return Ultralytics()
    if trust_pickle and suffix in _TRUSTED:
        return _TRUSTED[suffix]
    if suffix in _REFUSED:
        what, remedy = _REFUSED[suffix]
        raise ModelError(what, where=source, remedy=remedy)
    return _SUFFIXES.get(suffix, Kind.UNKNOWN)


def _within(folder: Path) -> str:
    """Return what to give instead of a folder that cannot be read itself."""
    if files := sorted(folder.glob("*.gguf")):
        return f"Give a file in it, as {files[0].name}"
    if (folder / "snapshots").is_dir():
        return "It is a cache of Hugging Face's downloads: give the folder below snapshots"
    return f"Kedge reads {readable()}"


def readable() -> str:
    """Return a list of all readable kinds, in words."""
    others = [words for importer in registry.importers() for words in importer.reads]
    own = [".onnx", "FILE.py:FACTORY or MODULE:FACTORY (PyTorch)", ".pt2", ".keras", "a Hugging Face folder", ".gguf"]
    return ", ".join([*own, *others])
