"""``kedge-agent infer``: one inference in a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent.opening import open_model
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_protocol.errors import InputError, StorageError

Array = npt.NDArray[Any]


def infer(
    name: str,
    inputs: Sequence[str],
    *,
    target: str | None = None,
    backend: str | None = None,
    state: Path | None = None,
    output: Path | None = None,
) -> str:
    """Load a model, call it once, and return its answer.

    Args:
        name, target, backend, state: see :func:`kedge_agent.opening.open_model`.
        inputs: ``[INPUT=]FILE``: ``.npy``, or for the model's pipeline, without a name, a picture, a sound, or a file
            of text in UTF-8. ``-`` is standard input: what the pipeline takes, or numbers in JSON.
        output: a ``.npz`` file for the result.

    Returns:
        The result as one line of JSON; with ``output``, a description of what was written.

    Raises:
        InputError: a file is missing or not an array, the model does not take it, or JSON cannot say the result.
        StorageError: ``output`` cannot be written.
    """
    with open_model(name, target=target, backend=backend, state=state) as model:
        pipeline = model.config.pipeline
        split = [_split(one) for one in inputs]
        names, files = {name for name, _ in split}, [file for _, file in split]
        if len(names) != len(split) or files.count("-") > 1:
            raise InputError("an input is given twice")
        named = {name: _read(name, file, pipeline) for name, file in split}
        only = named.pop("") if set(named) == {""} else None
        if pipeline is not None and only is not None and not isinstance(only, np.ndarray):
            return _answered(model(only), output)
        result = model.raw(**named) if only is None else model.raw(only)
        values = result if isinstance(result, dict) else {model.outputs[0].name: result}
        if output is not None:
            return _written(output, values)
        return json.dumps({key: _plain(key, value) for key, value in values.items()}) + "\n"


def _split(text: str) -> tuple[str, str]:
    """Return the name in one option, empty if none is given, and the file."""
    name, equals, file = text.rpartition("=")
    return ("", text) if equals and not name.isidentifier() and not Path(file).exists() else (name, file)


def _read(name: str, file: str, pipeline: Pipeline | None) -> Any:
    """Return the value of one option: an array, or the pipeline's item, which has no name."""
    pipeline = None if name else pipeline
    if file == "-":
        return _from_standard_input(sys.stdin.buffer.read(), pipeline)
    path = Path(file)
    if not path.is_file():
        raise InputError("there is no such file", where=file)
    if path.suffix != ".npy":
        if pipeline is None:
            remedy = "Give a .npy file (numpy.save); pictures, sounds and texts go without a name to a pipeline"
            raise InputError("is no array, and no pipeline of the model takes it", where=file, remedy=remedy)
        return _text(path.read_bytes(), file) if pipeline.text is not None else file
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"is no array: {error}", where=file, remedy="Write one with numpy.save") from error


def _from_standard_input(raw: bytes, pipeline: Pipeline | None) -> Any:
    if pipeline is not None and pipeline.text is not None:
        return _text(raw, "standard input")
    # No picture and no sound begins like a list.
    if pipeline is not None and raw.lstrip()[:1] != b"[":
        return raw
    try:
        array = np.asarray(json.loads(raw))
    except ValueError as error:
        raise InputError(f"standard input holds no numbers in JSON: {error}") from error
    if array.dtype.kind == "O":
        raise InputError("standard input holds no numbers in JSON, but something else", remedy="Give a list of numbers")
    return array


def _text(raw: bytes, where: str) -> str:
    """Return a text without the end of its last line."""
    try:
        return raw.decode("utf-8").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise InputError("holds no text in UTF-8", where=where) from error


def _answered(answer: Any, output: Path | None) -> str:
    """Return a pipeline's answer as JSON, one line."""
    from kedge_targets.pipeline.answers import to_json

    if output is not None:
        raise InputError("a pipeline's answer is no array", where=str(output), remedy="Leave out the output file")
    return json.dumps({"answer": to_json(answer)}) + "\n"


def _written(path: Path, values: dict[str, Any]) -> str:
    try:
        with path.open("wb") as file:
            np.savez(file, allow_pickle=False, **{key: np.asarray(value) for key, value in values.items()})
    except OSError as error:
        raise StorageError(f"cannot be written: {error.strerror}", where=str(path)) from error
    return f"{path}: {', '.join(values)}\n"


def _plain(name: str, value: Any) -> Any:
    if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all():
        raise InputError(
            "holds NaN or infinity, which JSON cannot say", where=f"output {name!r}", remedy="Give --output FILE.npz"
        )
    if isinstance(value, np.ndarray) and value.dtype == np.float32:
        # The double with the same few digits: 0.1, not 0.10000000149011612.
        return np.reshape([float(text) for text in value.ravel().astype("U")], value.shape).tolist()
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
