"""Inspects pickles without running them, and reads them if the user trusts them."""

from __future__ import annotations

import pickle
import pickletools
import sys
import zipfile
from pathlib import Path
from typing import Any

from kedge_protocol.errors import ModelError

TORCH = (".pt", ".pth", ".ckpt", ".bin")
PLAIN = (".pkl", ".pickle", ".joblib")

FACTORY = (
    "Give FILE.py:FACTORY, a function that builds the module and loads these weights, or a .pt2 of torch.export.save"
)
TRUST = "or, if you made the file yourself or trust who did, add --trust-pickle"
_LOOKED_AT = 1 << 20


def modules(path: Path) -> set[str]:
    """Return the top-level modules that a pickle, or PyTorch's archive, would import, found in its opcodes without
    running it; empty if the file is not a pickle."""
    try:
        raw = _pickle_of(path)
        found, texts = set(), [""]
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name == "GLOBAL":
                found.add(str(argument).split(" ", 1)[0].partition(".")[0])
            elif opcode.name in ("SHORT_BINUNICODE", "BINUNICODE", "UNICODE"):
                texts.append(str(argument))
            elif opcode.name == "STACK_GLOBAL":
                found.update(text.partition(".")[0] for text in texts[-2:-1])
    except Exception:  # noqa: BLE001 -- whatever it is, it tells nothing
        return set()
    return found


def _pickle_of(path: Path) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            name = next(info.filename for info in archive.infolist() if info.filename.endswith("data.pkl"))
            return archive.read(name)
    return path.read_bytes()[: _LOOKED_AT * 64]


def is_ultralytics(path: Path) -> bool:
    """Return whether the file is a checkpoint of Ultralytics' YOLO."""
    return path.suffix.lower() in TORCH and "ultralytics" in modules(path)


def ultralytics(path: str) -> ModelError:
    """Return the error that says what to do with such a checkpoint."""
    return ModelError(
        "is a checkpoint of Ultralytics' YOLO, a pickle that only Ultralytics' own code reads, which is AGPL and no "
        "part of Kedge",
        where=path,
        remedy="Where it was trained: `yolo export model=best.pt format=onnx`, then give best.onnx; or `kedge "
        "toolchain install ultralytics`, which puts that code into an environment of its own, and --trust-pickle",
    )


def read(path: Path, folder: Path) -> Any:
    """Unpickle: this runs whatever code the file names.

    Args:
        folder: the user's current folder, which is searched for the modules of the file's classes.

    Raises:
        ModelError: the file is damaged, or a class cannot be imported.
    """
    sys.path.insert(0, str(folder))
    try:
        return _load(path)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name == "ultralytics":
            raise ultralytics(str(path)) from error
        raise ModelError(
            f"its classes are of the module {name!r}, which is not here",
            where=str(path),
            remedy=f"Install the package that brings it beside Kedge, or run in the folder of your {name}.py",
        ) from error
    except AttributeError as error:
        raise ModelError(
            f"a class of it is not where it was when it was saved: {error}",
            where=str(path),
            remedy=FACTORY,
        ) from error
    except Exception as error:
        raise ModelError(
            f"cannot be read as a pickle: {' '.join(str(error).split())[:200] or type(error).__name__}",
            where=str(path),
            remedy=FACTORY,
        ) from error
    finally:
        sys.path.remove(str(folder))


def _load(path: Path) -> Any:
    suffix = path.suffix.lower()
    if suffix in TORCH:
        import torch

        return torch.load(str(path), map_location="cpu", weights_only=False)
    if suffix == ".joblib":
        import joblib

        return joblib.load(str(path))
    with path.open("rb") as file:
        try:
            return pickle.load(file)
        except (pickle.UnpicklingError, ValueError):
            import joblib

            return joblib.load(str(path))
