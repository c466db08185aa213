"""The Open Inference Protocol, version 2, REST and JSON (kserve/open-inference-protocol): requests in, answers out,
without a socket.

Tensors are JSON numbers, flat in row-major order or nested; binary tensors are not offered.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

import kedge_protocol
from kedge_agent.model import Loaded
from kedge_agent.serving.model_pool import Entry, ServedModels
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import InputError, KedgeError

Array = npt.NDArray[Any]

log = logging.getLogger("kedge.serving")

DATATYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
"""Datatype of the protocol → numpy's dtype."""
_NAMES = {dtype: name for name, dtype in DATATYPES.items()}
_MAX_RANK = 16


@dataclass(frozen=True)
class Answer:
    """An HTTP status and the JSON body."""

    status: int
    body: dict[str, Any]

    def encode(self) -> bytes:
        """The body's bytes.

        Raises:
            ValueError: a number that JSON does not have (NaN, infinity).
        """
        return json.dumps(self.body, allow_nan=False, separators=(",", ":")).encode()


def refusal(status: int, text: str) -> Answer:
    """An error as the protocol writes it."""
    return Answer(status, {"error": text})


class InferenceHandler:
    """Answers requests with the models that are loaded.

    Args:
        models: looked up anew in each request.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def answer(self, method: str, path: str, body: bytes = b"") -> Answer:
        """Answer one request; nothing is raised.

        Args:
            method: ``GET`` or ``POST``.
            path: of the URL, a query is passed over.
            body: of a POST.
        """
        parts = path.partition("?")[0].strip("/").split("/")
        if parts[0] != "v2":
            return refusal(404, "unknown path; the Open Inference Protocol begins at /v2")
        if parts[1:2] == ["models"] and len(parts) > 2:
            return self._of_model(method, parts[2], parts[3:], body)
        plain: dict[tuple[str, ...], Callable[[], Answer]] = {
            (): self._server,
            ("health", "live"): lambda: Answer(200, {"live": True}),
            ("health", "ready"): self._ready,
        }
        found = plain.get(tuple(parts[1:]))
        if found is None:
            return refusal(404, f"unknown path {path[:200]!r}")
        return found() if method == "GET" else refusal(405, f"{method} is not for this path")

    def _server(self) -> Answer:
        return Answer(200, {"name": "kedge-agent", "version": kedge_protocol.__version__, "extensions": []})

    def _ready(self) -> Answer:
        if not self._models.scanned:
            return Answer(503, {"ready": False, "error": "the models are still being loaded"})
        found = ((name, self._models.get(name)) for name in self._models.names())
        failed = [f"{name}: {entry.error}" for name, entry in found if entry is not None and entry.model is None]
        if failed:
            return Answer(503, {"ready": False, "error": "; ".join(failed)})
        return Answer(200, {"ready": True})

    def _of_model(self, method: str, name: str, rest: list[str], body: bytes) -> Answer:
        entry = self._models.get(name)
        if entry is None:
            if not self._models.scanned:
                return refusal(503, "the models are still being loaded")
            there = ", ".join(self._models.names()) or "none"
            return refusal(404, f"no model {name[:80]!r} is installed; installed are: {there}")
        model = entry.model
        if model is None:
            return refusal(503, f"the model {name!r} is not ready: {entry.error}")
        try:
            loaded = model.loaded()
        except InputError as error:
            return refusal(503, f"the model {name!r} is not ready: {error}")  # it was removed meanwhile
        if rest[:1] == ["versions"] and len(rest) > 1:
            version = loaded.bundle.config.version
            if rest[1] != version:
                return refusal(404, f"version {rest[1][:80]!r} does not serve; {version!r} does")
            rest = rest[2:]
        if rest == ["infer"]:
            return self._infer(name, loaded, body) if method == "POST" else refusal(405, "infer takes a POST")
        if rest not in ([], ["ready"]):
            return refusal(404, f"unknown path below the model {name!r}")
        if method != "GET":
            return refusal(405, f"{method} is not for this path")
        return Answer(200, {"name": name, "ready": True}) if rest else _metadata(name, entry, loaded.bundle)

    def _infer(self, name: str, loaded: Loaded, body: bytes) -> Answer:
        config = loaded.bundle.config
        try:
            request = _parsed(body)
            wanted = _wanted(request, config)
            inputs = _inputs(request)
            result = loaded(inputs, {})
        except InputError as error:
            return refusal(400, str(error))
        except KedgeError as error:
            log.error("%s: %s", name, error)
            return refusal(500, str(error))
        except Exception as error:
            # Whatever a runtime may raise: one call fails, the server goes on.
            log.exception("%s: a call failed", name)
            return refusal(500, f"{type(error).__name__}: {error}")
        outputs = result if isinstance(result, dict) else {config.outputs[0].name: result}
        tensors = [_tensor(output, outputs[output]) for output in wanted or outputs]
        answer: dict[str, Any] = {"model_name": name, "model_version": config.version, "outputs": tensors}
        if isinstance(request.get("id"), str):
            answer["id"] = request["id"]
        return Answer(200, answer)


def _metadata(name: str, entry: Entry, bundle: Bundle) -> Answer:
    config = bundle.config
    return Answer(
        200,
        {
            "name": name,
            "versions": [config.version],
            "platform": f"kedge_{config.backend}",
            "inputs": [_described(spec) for spec in config.inputs],
            "outputs": [_described(spec) for spec in config.outputs],
            "parameters": {"digest": bundle.digest, "labels": list(config.labels), "failure": entry.error},
        },
    )


def _described(spec: TensorSpec) -> dict[str, Any]:
    shape = [-1 if axis is None else axis for axis in spec.shape]
    return {"name": spec.name, "datatype": _NAMES.get(spec.dtype, spec.dtype.upper()), "shape": shape}


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number in JSON")


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        request = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the body is not JSON: {error}") from error
    if not isinstance(request, dict):
        raise InputError("the body is not a JSON object")
    return request


def _wanted(request: dict[str, Any], config: BundleConfig) -> list[str]:
    asked = request.get("outputs", [])
    known = [spec.name for spec in config.outputs]
    if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
        raise InputError("'outputs' is not a list of objects")
    names = [item.get("name") for item in asked]
    for wanted in names:
        if wanted not in known:
            raise InputError(f"no output {str(wanted)[:80]!r}; the model gives {', '.join(known)}")
    return [str(wanted) for wanted in names]


def _inputs(request: dict[str, Any]) -> dict[str, Array]:
    given = request.get("inputs")
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InputError("'inputs' is missing or not a list of objects")
    arrays: dict[str, Array] = {}
    for item in given:
        name = item.get("name")
        if not isinstance(name, str):
            raise InputError("an input has no name")
        if name in arrays:
            raise InputError("is given twice", where=f"input {name!r}")
        arrays[name] = _array(item, where=f"input {name[:80]!r}")
    return arrays


def _array(item: dict[str, Any], *, where: str) -> Array:
    """One request tensor, checked: what it says of itself must be true."""
    datatype, shape, data = item.get("datatype"), item.get("shape"), item.get("data")
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise InputError(f"datatype {str(datatype)[:40]!r} is not known; known are {', '.join(DATATYPES)}", where=where)
    axes_fit = isinstance(shape, list) and all(type(axis) is int and axis >= 0 for axis in shape)
    if not isinstance(shape, list) or not axes_fit or len(shape) > _MAX_RANK:
        raise InputError("'shape' is not a list of whole numbers", where=where)
    if not isinstance(data, list):
        raise InputError("'data' is not a list; binary tensors are not offered, send JSON", where=where)
    dtype = np.dtype(DATATYPES[datatype])
    try:
        values = np.asarray(data)
    except (ValueError, OverflowError) as error:
        raise InputError(f"'data' is no tensor: {error}", where=where) from error
    if values.size != math.prod(shape):
        raise InputError(f"{values.size} numbers do not fill the shape {shape}", where=where)
    if values.ndim > 1 and list(values.shape) != shape:
        raise InputError(f"'data' is nested as {list(values.shape)}, the shape is {shape}", where=where)
    allowed = {"b": "b", "i": "iu", "u": "iu", "f": "fiu"}[dtype.kind]
    if values.dtype.kind == "O" or (dtype.kind in "iu" and values.dtype.kind == "f"):
        try:
            values = _exact(data, values, dtype.kind)
        except OverflowError as error:
            raise InputError(f"'data' is out of the range of {datatype}", where=where) from error
    if values.size and values.dtype.kind not in allowed:
        raise InputError(f"'data' is not of datatype {datatype}", where=where)
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise InputError(f"'data' is out of the range of {datatype}", where=where)
    with np.errstate(over="ignore"):
        return values.astype(dtype).reshape(shape)


def _exact(data: list[Any], values: Array, kind: str) -> Array:
    """Numbers for which numpy takes another kind of type: it makes floats of integers that no one of its types holds
    together (1 and 2**63), and objects of those beyond 64 bits.

    Raises:
        OverflowError: they are in no type's range.
    """
    exact = np.array(data, dtype=object)
    types = {type(number) for number in exact.flat}
    if kind == "f":
        return exact.astype("float64") if types <= {int, float} else values
    if types != {int}:
        return values
    if not all(0 <= number < 1 << 64 for number in exact.flat):
        raise OverflowError
    return exact.astype("uint64")


def _tensor(name: str, array: Array) -> dict[str, Any]:
    return {
        "name": name,
        "datatype": _NAMES.get(array.dtype.name, array.dtype.name.upper()),
        "shape": list(array.shape),
        "data": array.ravel().tolist(),
    }
