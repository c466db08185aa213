"""An inference request, independent of its transport: its tensors in, the model's tensors out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kedge_agent.serving import binary_tensors, json_tensors
from kedge_agent.serving.datatypes import Array, checked_datatype, checked_shape, converted, datatype_of, name_of
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    from kedge_agent.loaded import Loaded

_MAX_CLASSES = 10_000
_SHORT_HEADER = 1024
_TOO_FEW = "'binary_data_size' is more than what follows the JSON"


@dataclass(slots=True)
class RequestedOutput:
    """An output that a client requests.

    Attributes:
        binary: whether it is sent as bytes instead of JSON.
        classes: number of best classes to send as texts ``value:index:label`` in place of the numbers; 0 for the
            numbers.
    """

    name: str
    binary: bool = False
    classes: int = 0


@dataclass(slots=True)
class InferRequest:
    """A parsed request, checked as far as possible without the model.

    Attributes:
        inputs: name → tensor, in the datatype that the client sent.
        outputs: the requested outputs; empty for all.
        binary: whether all outputs are sent as bytes if ``outputs`` is empty.
        id: the client's id of the request, returned in the answer.
    """

    inputs: dict[str, Array]
    outputs: list[RequestedOutput] = field(default_factory=list)
    binary: bool = False
    id: str = ""


@dataclass(slots=True)
class InferResult:
    """A model's answer.

    Attributes:
        outputs: each requested output with its tensor.
        version: version of the bundle that computed the answer.
        conversions: input → the datatypes sent and taken, for inputs where they differ.
    """

    outputs: list[tuple[RequestedOutput, Array]]
    version: str
    conversions: dict[str, str]


def from_json(body: bytes, header_length: str | None, config: BundleConfig) -> InferRequest:
    """Parse a REST request.

    Args:
        body: JSON, possibly followed by bytes of tensors.
        header_length: value of the field ``Inference-Header-Content-Length``: bytes of the JSON before the tensors.
        config: the bundle's configuration.

    Raises:
        InputError: the request is wrong; the message says what.
    """
    binary = memoryview(b"")
    if header_length is not None:
        length = _whole_number(header_length, "Inference-Header-Content-Length")
        if length > len(body):
            raise InputError(f"Inference-Header-Content-Length is {length}, the body has {len(body)} bytes")
        body, binary = body[:length], memoryview(body)[length:]
        if length <= _SHORT_HEADER:
            form = _form(body)
            if form is not None:
                return InferRequest(form.arrays(binary), [], form.binary, form.id)
    request = json_tensors.parse(body, config.inputs)
    parameters = _parameters(request, "the request")
    every = _truth(parameters, "binary_data_output", "the request")
    # What some clients leave out, others give as null.
    identifier = "" if request.get("id") is None else request["id"]
    if not isinstance(identifier, str):
        raise InputError("'id' is no text")
    # One rare letter first: it is found ten times as fast as a word.
    truths = (b"r" in body and b"true" in body) or (b"l" in body and b"false" in body)
    inputs = _inputs(request, binary, truths=truths)
    outputs = _outputs(request, config, every)
    return InferRequest(inputs, outputs, every, identifier)


class _Form(NamedTuple):
    """A request's JSON that gives every input as bytes and asks for all outputs; a client's requests often share it.

    Attributes:
        inputs: name, datatype, shape and bytes of each.
        binary, id: see :class:`InferRequest`.
    """

    inputs: tuple[tuple[str, str, list[int], int], ...]
    binary: bool
    id: str

    def arrays(self, binary: memoryview) -> dict[str, Array]:
        """Return the tensors, given the bytes behind the JSON.

        Raises:
            InputError: they are more or less than the inputs need.
        """
        arrays: dict[str, Array] = {}
        at = 0
        for name, datatype, shape, size in self.inputs:
            where = f"input {name[:80]!r}"
            if size > binary.nbytes - at:
                raise InputError(_TOO_FEW, where=where)
            arrays[name] = binary_tensors.array_of(binary[at : at + size], datatype, shape, where=where)
            at += size
        _check_rest(binary.nbytes - at)
        return arrays


@functools.lru_cache(64)
def _form(header: bytes) -> _Form | None:
    """Return what a JSON header says; None if it is not of this form, or wrong: then the general way finds out why."""
    try:
        request = json_tensors.parse(header, ())
        parameters = _parameters(request, "")
        identifier, given = request.get("id", ""), request.get("inputs")
        if "outputs" in request or not isinstance(identifier, str) or not isinstance(given, list):
            return None
        inputs = []
        for item in given:
            size = _parameters(item, "").get("binary_data_size")
            if type(size) is not int or size < 0 or "data" in item or not isinstance(item.get("name"), str):
                return None
            datatype = checked_datatype(item.get("datatype"), where="")
            inputs.append((item["name"], datatype, checked_shape(item.get("shape"), where=""), size))
        if len({name for name, *_ in inputs}) != len(inputs):
            return None
        return _Form(tuple(inputs), _truth(parameters, "binary_data_output", ""), identifier)
    except (InputError, AttributeError):
        return None


def run(loaded: Loaded, request: InferRequest, *, counted: bool = True) -> InferResult:
    """Run a bundle on a request.

    Args:
        counted: whether it counts as a call of a user.

    Raises:
        InputError: the model does not take these tensors.
        KedgeError: the runtime fails.
    """
    config, taken = loaded.bundle.config, loaded.taken
    conversions: dict[str, str] = {}
    inputs = request.inputs
    for name, sent in request.inputs.items():
        dtype = taken.get(name)
        if dtype is not None and sent.dtype != dtype:
            array = converted(sent, dtype, where=f"input {name[:80]!r}")
            if dtype.kind != "U":
                conversions[name] = f"{datatype_of(sent)} to {name_of(dtype.name)}"
            inputs = {**inputs, name: array}
    only = len(inputs) == 1 == len(taken) and inputs.keys() == taken.keys()
    given = next(iter(inputs.values())) if only else inputs
    result = loaded(given, {}) if counted else loaded.answer(given, {})
    named = result if isinstance(result, dict) else {config.outputs[0].name: result}
    wanted = request.outputs or [RequestedOutput(name, request.binary) for name in named]
    outputs = [
        (output, named[output.name] if not output.classes else _classes(named[output.name], output, config.labels))
        for output in wanted
    ]
    return InferResult(outputs, config.version, conversions)


def _inputs(request: dict[str, Any], binary: memoryview, *, truths: bool) -> dict[str, Array]:
    given = request.get("inputs")
    if not isinstance(given, list) or not all(isinstance(item, dict) for item in given):
        raise InputError("'inputs' is missing or not a list of objects")
    arrays: dict[str, Array] = {}
    at = 0
    for item in given:
        name = item.get("name")
        if not isinstance(name, str):
            raise InputError("an input has no name")
        where = f"input {name[:80]!r}"
        if name in arrays:
            raise InputError("is given twice", where=where)
        size = _parameters(item, where).get("binary_data_size")
        if size is None:
            arrays[name] = json_tensors.array_of(item, where=where, truths=truths)
            continue
        if type(size) is not int or not 0 <= size <= binary.nbytes - at:
            raise InputError(_TOO_FEW, where=where)
        if "data" in item:
            raise InputError("'data' and 'binary_data_size' are both given", where=where)
        datatype = checked_datatype(item.get("datatype"), where=where)
        shape = checked_shape(item.get("shape"), where=where)
        arrays[name] = binary_tensors.array_of(binary[at : at + size], datatype, shape, where=where)
        at += size
    _check_rest(binary.nbytes - at)
    return arrays


def _check_rest(size: int) -> None:
    if size:
        raise InputError(f"{size} bytes behind the JSON belong to no input")


def _outputs(request: dict[str, Any], config: BundleConfig, every: bool) -> list[RequestedOutput]:
    asked = [] if request.get("outputs") is None else request["outputs"]
    if not isinstance(asked, list) or not all(isinstance(item, dict) for item in asked):
        raise InputError("'outputs' is not a list of objects")
    return [_output(item, config, every) for item in asked]


def _output(item: dict[str, Any], config: BundleConfig, every: bool) -> RequestedOutput:
    name = checked_output(item.get("name"), config)
    where = f"output {name!r}"
    parameters = _parameters(item, where)
    binary = every if parameters.get("binary_data") is None else _truth(parameters, "binary_data", where)
    classes = parameters.get("classification")
    return RequestedOutput(name, binary, 0 if classes is None else checked_classes(classes, where=where))


def checked_output(name: object, config: BundleConfig) -> str:
    """Return the name if the model has such an output.

    Raises:
        InputError: the model has no such output.
    """
    known = [spec.name for spec in config.outputs]
    if not isinstance(name, str) or name not in known:
        raise InputError(f"no output {str(name)[:80]!r}; the model gives {', '.join(known)}")
    return name


def checked_classes(count: object, *, where: str) -> int:
    """Return the number of requested classes.

    Raises:
        InputError: it is not an integer in range.
    """
    if type(count) is int and 0 <= count <= _MAX_CLASSES:
        return count
    raise InputError(f"'classification' is not a whole number up to {_MAX_CLASSES}", where=where)


def _classes(array: Array, output: RequestedOutput, labels: Sequence[str]) -> Array:
    """Return the best classes of each sample as ``value:index:label`` (the label only if the bundle has one), best
    first; equal values in the order of the classes."""
    rows = array.reshape(array.shape[0], -1) if array.ndim > 1 else array.reshape(1, -1)
    count = min(output.classes, rows.shape[1])
    order = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    texts = np.empty(order.shape, dtype=object)
    for row, classes in enumerate(order.tolist()):
        for place, index in enumerate(classes):
            text = f"{float(rows[row, index]):f}:{index}"
            texts[row, place] = (f"{text}:{labels[index]}" if index < len(labels) else text).encode()
    return texts if array.ndim > 1 else texts[0]


def _parameters(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    parameters = item.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InputError("'parameters' is not an object", where=where)
    return parameters


def _truth(parameters: Mapping[str, Any], name: str, where: str) -> bool:
    value = parameters.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise InputError(f"{name!r} is neither true nor false", where=where)
    return value


def _whole_number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise InputError(f"{what} is no number")
    return int(text)
