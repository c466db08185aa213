"""Serves the Open Inference Protocol over gRPC if the settings ask for it (extra ``grpc``).

The handler is the same as for REST; tensors are sent as raw bytes.
"""

from __future__ import annotations

import hmac
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from kedge_agent.loaded import Loaded
from kedge_agent.serving import binary_tensors, descriptions, infer_request, open_inference, repository
from kedge_agent.serving.datatypes import DATATYPES, Array, checked_datatype, checked_shape, datatype_of
from kedge_agent.serving.grpc_messages import DATA_TYPES, INSTANCE_KINDS, SERVICE, message_classes
from kedge_agent.serving.grpc_relay import GrpcRelay, inner_address
from kedge_agent.serving.handler import Response
from kedge_agent.serving.infer_request import InferRequest, RequestedOutput, checked_classes, checked_output
from kedge_agent.serving.model_pool import Entry
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.serving.repository import NoModelError
from kedge_agent.serving.settings import ServerSettings
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import ConfigError, InputError, KedgeError, MissingDependencyError

log = logging.getLogger("kedge.serving")

_THREADS = 8
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}


class RefusedCallError(Exception):
    """A call that ends with a status.

    Args:
        status: name of a ``grpc.StatusCode``.
        text: the reason.
    """

    def __init__(self, status: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


class _Call:
    """One inference as a task for the model's pool."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work = work
        self.done = threading.Event()
        self.abandoned = False
        self.result: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        if not self.abandoned:
            try:
                self.result = self._work()
            except Exception as error:  # noqa: BLE001 -- raised again where the call waits
                self.error = error
        self.done.set()


class GrpcServer:
    """The gRPC server; it serves from its own threads until it is stopped.

    Args:
        handler: answers the calls.
        settings: ``grpc_listen`` must be set, or
        listening: the agent's socket for gRPC, from which connections are passed on.

    Raises:
        MissingDependencyError: grpcio is not installed.
        ConfigError: the server cannot listen on the address.
    """

    def __init__(
        self, handler: InferenceHandler, settings: ServerSettings, listening: socket.socket | None = None
    ) -> None:
        try:
            import grpc

            self._messages = message_classes()
        except ImportError as error:
            raise MissingDependencyError(
                "gRPC is asked for, and grpcio or protobuf is not installed",
                remedy='Install "kedge-agent[grpc]", or leave the gRPC address out',
            ) from error
        self._grpc = grpc
        self._handler = handler
        self._token = settings.token()
        most = settings.max_body_bytes
        options = [("grpc.max_receive_message_length", most), ("grpc.max_send_message_length", -1)]
        self._server = grpc.server(ThreadPoolExecutor(_THREADS, "kedge-grpc"), options=options)
        self._server.add_generic_rpc_handlers((self._generic_handler(),))
        self._relay: GrpcRelay | None = None
        if listening is None:
            self.port = self._listen(settings, settings.grpc_listen or "")
        else:
            inner = inner_address()
            self._relay = GrpcRelay(listening, inner)
            self.port = self._relay.port
            self._listen(settings, f"unix-abstract:{inner}")

    def start(self) -> None:
        """Start accepting calls."""
        self._server.start()
        if self._relay is not None:
            self._relay.start()

    def stop(self, seconds: float) -> None:
        """Accept no more calls, and end those in progress within ``seconds``."""
        self._server.stop(seconds).wait(seconds)
        if self._relay is not None:
            self._relay.stop(seconds)

    def _listen(self, settings: ServerSettings, address: str) -> int:
        try:
            if settings.tls_cert is None:
                return int(self._server.add_insecure_port(address))
            key = Path(settings.tls_key or settings.tls_cert).read_bytes()
            ca = None if settings.tls_client_ca is None else Path(settings.tls_client_ca).read_bytes()
            pairs = [(key, Path(settings.tls_cert).read_bytes())]
            credentials = self._grpc.ssl_server_credentials(pairs, ca, require_client_auth=ca is not None)
            return int(self._server.add_secure_port(address, credentials))
        except (OSError, RuntimeError) as error:
            raise ConfigError(f"gRPC cannot listen: {error}", where=address, remedy="Choose a free port") from error

    def _generic_handler(self) -> Any:
        grpc, messages = self._grpc, self._messages
        methods: dict[str, Any] = {}
        for name, call in (
            ("ServerLive", self._live),
            ("ServerReady", self._ready),
            ("ModelReady", self._model_ready),
            ("ServerMetadata", self._server_metadata),
            ("ModelMetadata", self._model_metadata),
            ("ModelConfig", self._model_config),
            ("ModelStatistics", self._statistics),
            ("ModelInfer", self._infer),
            ("RepositoryIndex", self._index),
            ("RepositoryModelLoad", lambda request: self._repository(request, "load")),
            ("RepositoryModelUnload", lambda request: self._repository(request, "unload")),
        ):
            methods[name] = grpc.unary_unary_rpc_method_handler(
                self._guarded(call, messages[f"{name}Response"]),
                request_deserializer=messages[f"{name}Request"].FromString,
                response_serializer=lambda message: message.SerializeToString(),
            )
        methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self._stream,
            request_deserializer=messages["ModelInferRequest"].FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    def _guarded(self, call: Callable[[Any], Any], answer: Any) -> Callable[[Any, Any], Any]:
        def guarded(request: Any, context: Any) -> Any:
            try:
                self._admit(context)
                return call(request)
            except RefusedCallError as error:
                context.set_code(getattr(self._grpc.StatusCode, error.status))
                context.set_details(error.text)
            return answer()

        return guarded

    def _admit(self, context: Any) -> None:
        if self._token is None:
            return
        found = dict(context.invocation_metadata()).get("authorization", "")
        scheme, _, token = found.partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            raise RefusedCallError("UNAUTHENTICATED", "a valid token is needed")

    # The calls.

    def _live(self, request: Any) -> Any:
        return self._messages["ServerLiveResponse"](live=True)

    def _ready(self, request: Any) -> Any:
        return self._messages["ServerReadyResponse"](ready=self._handler.not_ready() is None)

    def _model_ready(self, request: Any) -> Any:
        try:
            self._handler.find(request.name, request.version or None)
        except NoModelError:
            return self._messages["ModelReadyResponse"](ready=False)
        return self._messages["ModelReadyResponse"](ready=True)

    def _server_metadata(self, request: Any) -> Any:
        return self._messages["ServerMetadataResponse"](**descriptions.server_metadata())

    def _model_metadata(self, request: Any) -> Any:
        found = self._of(lambda: self._handler.metadata(request.name, request.version or None))
        del found["parameters"]
        return self._messages["ModelMetadataResponse"](**found)

    def _model_config(self, request: Any) -> Any:
        _, loaded = self._find(request.name, request.version)
        found = descriptions.configuration(request.name, loaded)
        config = {key: found[key] for key in ("name", "platform", "backend", "max_batch_size")}
        for side in ("input", "output"):
            config[side] = [
                {**one, "data_type": DATA_TYPES.index(one["data_type"].removeprefix("TYPE_"))} for one in found[side]
            ]
        config["instance_group"] = [
            {**one, "kind": INSTANCE_KINDS.index(one["kind"])} for one in found["instance_group"]
        ]
        if "dynamic_batching" in found:
            config["dynamic_batching"] = found["dynamic_batching"]
        return self._messages["ModelConfigResponse"](config=config)

    def _statistics(self, request: Any) -> Any:
        rows = self._of(lambda: self._handler.statistics(request.name, request.version or None))
        for row in rows:
            row.pop("cascade", None)
        return self._messages["ModelStatisticsResponse"](model_stats=rows)

    def _index(self, request: Any) -> Any:
        return self._messages["RepositoryIndexResponse"](models=self._handler.index(only_ready=request.ready))

    def _repository(self, request: Any, verb: str) -> Any:
        versions = None
        if verb == "load":
            given = {name: one.string_param for name, one in request.parameters.items()}
            versions = self._of(lambda: repository.chosen(given))
        response = self._handler.change_repository(request.model_name, verb, versions)
        if response.status != 200:
            status = {403: "PERMISSION_DENIED", 404: "NOT_FOUND"}.get(response.status, "INVALID_ARGUMENT")
            raise RefusedCallError(status, response.error or "")
        return self._messages["RepositoryModelLoadResponse" if verb == "load" else "RepositoryModelUnloadResponse"]()

    def _stream(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        for request in requests:
            answer = self._messages["ModelStreamInferResponse"]()
            try:
                self._admit(context)
                answer.infer_response.CopyFrom(self._infer(request))
            except RefusedCallError as error:
                answer.error_message = error.text
                answer.infer_response.id = request.id
            yield answer

    def _infer(self, request: Any) -> Any:
        self._handler.wait_for(request.model_name, request.model_version or None)
        entry, _ = self._find(request.model_name, request.model_version)
        arrived = perf_counter_ns()
        call = _Call(lambda: self._answer(request, arrived))
        if not entry.workers.submit(call):
            raise RefusedCallError("RESOURCE_EXHAUSTED", f"too many requests wait for {request.model_name!r}")
        if not call.done.wait(entry.workers.deadline):
            call.abandoned = True
            raise RefusedCallError("DEADLINE_EXCEEDED", f"no answer within {entry.workers.deadline:g} s")
        error = call.error
        if error is None:
            return call.result
        if isinstance(error, RefusedCallError):
            raise error
        if isinstance(error, InputError):
            raise RefusedCallError("INVALID_ARGUMENT", str(error))
        if not isinstance(error, KedgeError):
            log.error("%s: a call failed", request.model_name, exc_info=error)
        raise RefusedCallError("INTERNAL", str(error) or type(error).__name__)

    def _answer(self, request: Any, arrived: int) -> Any:
        """Answer a call; runs in a thread of the model's pool."""
        begun = perf_counter_ns()
        entry, loaded = self._find(request.model_name, request.model_version)
        cache = self._handler.cache
        if cache is None:
            return self._computed(entry, loaded, request, arrived, begun)
        identifier, request.id = request.id, ""
        key = cache.key_of_message(loaded.digest, request.SerializeToString(deterministic=True))
        found, looked = cache.get(key), perf_counter_ns()
        counts = entry.statistics.mine()
        if found is not None:
            answer = self._messages["ModelInferResponse"].FromString(found.response.body)
            answer.id = identifier
            counts.record_hit(samples=found.samples, queue=begun - arrived, look=looked - begun)
            return answer
        samples = counts.samples
        answer = self._computed(entry, loaded, request, arrived, begun)
        done = perf_counter_ns()
        cache.put(key, Response(200, answer.SerializeToString()), counts.samples - samples)
        answer.id = identifier
        counts.record_miss(looked - begun + perf_counter_ns() - done)
        return answer

    def _computed(self, entry: Entry, loaded: Loaded, request: Any, arrived: int, begun: int) -> Any:
        counts = entry.statistics.mine()
        try:
            asked = _request(request, loaded.bundle.config)
            read = perf_counter_ns()
            result = infer_request.run(loaded, asked)
            ran = perf_counter_ns()
            answer = self._messages["ModelInferResponse"](
                model_name=request.model_name, model_version=result.version, id=request.id
            )
            for output, array in result.outputs:
                answer.outputs.add(name=output.name, datatype=datatype_of(array), shape=array.shape)
                answer.raw_output_contents.append(bytes(binary_tensors.bytes_of(array)))
        except BaseException:
            counts.record_failure(perf_counter_ns() - arrived)
            raise
        counts.record(
            samples=open_inference.samples_of(asked.inputs),
            queue=begun - arrived,
            input=read - begun,
            infer=ran - read,
            output=perf_counter_ns() - ran,
        )
        return answer

    def _find(self, name: str, version: str) -> Any:
        return self._of(lambda: self._handler.find(name, version or None))

    @staticmethod
    def _of(found: Callable[[], Any]) -> Any:
        """Return what the handler finds; what it does not becomes a status."""
        try:
            return found()
        except NoModelError as error:
            status = {400: "INVALID_ARGUMENT", 404: "NOT_FOUND"}.get(error.status, "UNAVAILABLE")
            raise RefusedCallError(status, error.text) from error


def _request(request: Any, config: BundleConfig) -> InferRequest:
    """Return a message's tensors as a request.

    Raises:
        InputError: a tensor does not match its datatype or shape.
    """
    raw = list(request.raw_input_contents)
    if raw and len(raw) != len(request.inputs):
        raise InputError(f"{len(raw)} raw contents do not fit {len(request.inputs)} inputs")
    inputs: dict[str, Array] = {}
    for number, item in enumerate(request.inputs):
        where = f"input {item.name[:80]!r}"
        datatype = checked_datatype(item.datatype, where=where)
        shape = checked_shape(list(item.shape), where=where)
        if item.name in inputs:
            raise InputError("is given twice", where=where)
        if raw:
            inputs[item.name] = binary_tensors.array_of(memoryview(raw[number]), datatype, shape, where=where)
        else:
            inputs[item.name] = _typed(item.contents, datatype, shape, where=where)
    outputs = [
        RequestedOutput(
            checked_output(item.name, config),
            True,
            checked_classes(item.parameters["classification"].int64_param, where=f"output {item.name!r}")
            if "classification" in item.parameters
            else 0,
        )
        for item in request.outputs
    ]
    return InferRequest(inputs, outputs, True, request.id)


def _typed(contents: Any, datatype: str, shape: list[int], *, where: str) -> Array:
    """Return a tensor from the message's typed fields."""
    import numpy as np

    field = _CONTENTS.get(datatype)
    if field is None:
        raise InputError(f"{datatype} goes as raw contents alone", where=where)
    values = getattr(contents, field)
    if datatype == "BYTES":
        array = np.empty(len(values), dtype=object)
        array[:] = list(values)
    else:
        wide = np.asarray(values)
        array = wide.astype(DATATYPES[datatype])
        if not np.array_equal(wide, array.astype(wide.dtype), equal_nan=wide.dtype.kind == "f"):
            raise InputError(f"a number is out of the range of {datatype}", where=where)
    try:
        return array.reshape(shape)
    except ValueError as error:
        raise InputError(f"{array.size} values do not fill the shape {shape}", where=where) from error
