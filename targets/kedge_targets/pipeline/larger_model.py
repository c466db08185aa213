"""A client of the Open Inference Protocol, version 2, for the larger model of a cascade: binary tensors over HTTP, each
call within a number of seconds."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from kedge_protocol import credentials
from kedge_protocol.errors import ConfigError, EndpointError

Array = npt.NDArray[Any]

TOKEN_FILE = "KEDGE_CASCADE_TOKEN_FILE"
"""Environment variable with the path of a file whose content is sent as ``Authorization: Bearer``."""
_HEADER_LENGTH = "Inference-Header-Content-Length"
_MOST_BYTES = 64 << 20
_PIECE = 1 << 16
_IDLE = 8
_CLOSED = (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError)
_DTYPES = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "INT8": "int8",
    "UINT16": "<u2",
    "INT16": "<i2",
    "UINT32": "<u4",
    "INT32": "<i4",
    "UINT64": "<u8",
    "INT64": "<i8",
    "FP16": "<f2",
    "FP32": "<f4",
    "FP64": "<f8",
}
_NAMES = {np.dtype(dtype).newbyteorder("="): name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class LargerAnswer:
    """The larger model's outputs, and the version that gave them."""

    outputs: dict[str, Array]
    version: str


class LargerModel:
    """One model at one server. Several threads may use it at the same time; connections are kept open between calls.

    Args:
        url: the server.
        model, version: the model there; an empty version leaves the choice to the server.

    Raises:
        ConfigError: the file that :data:`TOKEN_FILE` names does not hold a token.
    """

    def __init__(self, url: str, model: str, version: str = "") -> None:
        parts = urlsplit(url)
        self.where = f"{url.rstrip('/')}, model {model!r}"
        self._host, self._port = parts.hostname or "", parts.port
        self._context = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = f"{parts.path.rstrip('/')}/v2/models/{quote(model, safe='')}"
        self._path += f"/versions/{quote(version, safe='')}" if version else ""
        self._idle: deque[http.client.HTTPConnection] = deque(maxlen=_IDLE)
        self._fields = {"Connection": "keep-alive"}
        if file := os.environ.get(TOKEN_FILE):
            self._fields["Authorization"] = f"Bearer {_token(Path(file))}"

    def metadata(self, seconds: float) -> dict[str, Any]:
        """Return the model's metadata: its inputs, outputs and platform.

        Raises:
            EndpointError: the server does not answer, or not in this form.
        """
        raw, _ = self._call("GET", self._path, b"", {}, seconds)
        found = self._json(raw)
        for side in ("inputs", "outputs"):
            if not found.get(side) or not all(isinstance(one.get("name"), str) for one in found[side]):
                raise EndpointError(f"the model's metadata has no {side}", where=self.where)
        return found

    def infer(self, inputs: Mapping[str, Array], seconds: float, *, output: str = "") -> LargerAnswer:
        """Return the model's answer to samples with a batch axis.

        Args:
            output: the only output wanted; empty for all.

        Raises:
            EndpointError: the server does not answer within ``seconds``, refuses, or answers in another form.
        """
        described, parts = [], []
        for name, array in inputs.items():
            kind = _NAMES.get(array.dtype)
            if kind is None:
                raise EndpointError(f"input {name!r}: {array.dtype} cannot be sent", where=self.where)
            raw = np.ascontiguousarray(array, np.dtype(_DTYPES[kind])).tobytes()
            size = {"binary_data_size": len(raw)}
            described.append({"name": name, "datatype": kind, "shape": list(array.shape), "parameters": size})
            parts.append(raw)
        asked: dict[str, Any] = {"inputs": described, "parameters": {"binary_data_output": True}}
        if output:
            asked["outputs"] = [{"name": output, "parameters": {"binary_data": True}}]
        head = json.dumps(asked).encode()
        fields = {_HEADER_LENGTH: str(len(head)), "Content-Type": "application/octet-stream"}
        body, length = self._call("POST", f"{self._path}/infer", b"".join((head, *parts)), fields, seconds)
        return self._answer(body, length)

    def close(self) -> None:
        """Close the connections that are kept open."""
        while self._idle:
            self._idle.pop().close()

    def _call(
        self, method: str, path: str, body: bytes, fields: Mapping[str, str], seconds: float
    ) -> tuple[bytes, str | None]:
        end = time.monotonic() + seconds
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._on(self._connection(), method, path, body, fields, end)
        try:
            return self._on(connection, method, path, body, fields, end)
        except EndpointError as error:
            # The server has closed an idle connection.
            if not isinstance(error.__cause__, _CLOSED):
                raise
            return self._on(self._connection(), method, path, body, fields, end)

    def _on(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        body: bytes,
        fields: Mapping[str, str],
        end: float,
    ) -> tuple[bytes, str | None]:
        try:
            if connection.sock is None:
                connection.timeout = _left(end)
                connection.connect()
            connection.sock.settimeout(_left(end))
            connection.request(method, path, body, {**self._fields, **fields})
            connection.sock.settimeout(_left(end))
            response = connection.getresponse()
            found = bytearray()
            while piece := response.read1(_PIECE):
                found += piece
                if len(found) > _MOST_BYTES:
                    raise EndpointError(f"the answer has more than {_MOST_BYTES} bytes", where=self.where)
                if connection.sock is not None:
                    connection.sock.settimeout(_left(end))
            response.close()  # its last piece does not
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise EndpointError(f"does not answer: {error or type(error).__name__}", where=self.where) from error
        except BaseException:
            connection.close()
            raise
        if connection.sock is not None:
            self._idle.append(connection)
        if response.status != http.HTTPStatus.OK:
            words = bytes(found[:200]).decode(errors="replace")
            raise EndpointError(f"answers {response.status}: {words}", where=self.where)
        return bytes(found), response.getheader(_HEADER_LENGTH)

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port)
        return http.client.HTTPSConnection(self._host, self._port, context=self._context)

    def _answer(self, raw: bytes, length: str | None) -> LargerAnswer:
        try:
            head = len(raw) if length is None else int(length)
            content, rest, at = self._json(raw[:head]), raw[head:], 0
            outputs = {}
            for one in content["outputs"]:
                dtype, shape = np.dtype(_DTYPES[one["datatype"]]), tuple(one["shape"])
                size = one.get("parameters", {}).get("binary_data_size")
                if size is None:
                    array = np.asarray(one["data"], dtype)
                else:
                    array, at = np.frombuffer(rest[at : at + size], dtype), at + size
                outputs[str(one["name"])] = array.reshape(shape)
            return LargerAnswer(outputs, str(content.get("model_version", "")))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EndpointError(f"the answer cannot be read: {error}", where=self.where) from error

    def _json(self, raw: bytes) -> dict[str, Any]:
        try:
            found = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise EndpointError(f"the answer is no JSON: {error}", where=self.where) from error
        if not isinstance(found, dict):
            raise EndpointError("the answer is no JSON object", where=self.where)
        return found


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left


def _token(path: Path) -> str:
    words = credentials.read(path, "the token file").decode(errors="replace").split()
    if len(words) != 1 or not words[0].isascii():
        raise ConfigError("the token file does not hold one word", where=str(path))
    return words[0]
