"""The Open Inference Protocol, version 2, over REST (kserve/open-inference-protocol), with its extensions for binary
tensors, classification, statistics and the model repository."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

from kedge_agent.loaded import Loaded
from kedge_agent.serving import binary_tensors, descriptions, infer_request, json_tensors, pipeline_request, repository
from kedge_agent.serving.answer_cache import AnswerCache
from kedge_agent.serving.datatypes import Array, datatype_of
from kedge_agent.serving.handler import (
    GOLDEN_FIELD,
    Handler,
    Job,
    Request,
    Response,
    error_response,
    json_response,
    segments,
    unavailable,
)
from kedge_agent.serving.infer_request import InferResult, RequestedOutput
from kedge_agent.serving.model_pool import Entry, ServedModels
from kedge_agent.serving.repository import NoModelError
from kedge_agent.serving.statistics import Counts
from kedge_agent.serving.worker_pool import WorkerPool
from kedge_protocol.errors import InputError

log = logging.getLogger("kedge.serving")

_HEADER_LENGTH = "Inference-Header-Content-Length"
_WAITING = 64
_LONGEST_WAIT = 600.0
_A_MOMENT = 0.02
_FLEET_DECIDES = "the fleet's desired state decides which models this device loads; roll a release out instead"


class InferenceHandler(Handler):
    """Answers requests below ``/v2``.

    Args:
        models: looked up again for each request.
        fleet: whether the fleet decides which models are loaded; then ``load`` and ``unload`` are refused.
        cache: keeps answers to requests that come again; None to keep none.
        call_seconds: time limit of a request that waits for its model to be loaded.
    """

    def __init__(
        self,
        models: ServedModels,
        *,
        fleet: bool = True,
        cache: AnswerCache | None = None,
        call_seconds: float = 30.0,
    ) -> None:
        self._models = models
        self.cache = cache
        self._fleet = fleet
        self._waiting = WorkerPool("larger model", threads=_WAITING, queue_limit=_WAITING, deadline=_LONGEST_WAIT)
        """Waits for larger models, so that no thread of a device's model does."""
        self.loading = WorkerPool("models that are being loaded", deadline=call_seconds)
        """Holds the requests that come before their model is loaded for the first time."""
        self._plain: dict[tuple[str, ...], Callable[[], Response]] = {
            (): self._server,
            ("health", "live"): lambda: json_response(200, {"live": True}),
            ("health", "ready"): self._ready,
            ("models", "stats"): self._all_statistics,
        }

    def methods(self, path: str) -> Sequence[str]:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        parts = segments(path)[1:]
        if not (path == "/v2" or path.startswith("/v2/")):
            return ()
        if tuple(parts) in self._plain:
            return ("GET",)
        if parts[:1] == ["repository"]:
            verb = parts[5:] if parts[3:4] == ["versions"] else parts[3:]
            found = parts[1:] == ["index"] or (parts[1:2] == ["models"] and verb in (["load"], ["unload"]))
            return ("POST",) if found else ()
        if parts[:1] != ["models"] or len(parts) < 2:
            return ()
        if parts[2:3] == ["versions"] and len(parts) < 4:
            return ()
        rest = parts[4:] if parts[2:3] == ["versions"] else parts[2:]
        if rest in (["infer"], ["pipeline"]):
            return ("POST",)
        return ("GET",) if rest in ([], ["ready"], ["config"], ["stats"]) else ()

    def route(self, request: Request) -> Response | Job:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        parts = segments(request.path)[1:]
        plain = self._plain.get(tuple(parts))
        if plain is not None:
            return plain()
        try:
            if parts[0] == "repository":
                return self._repository(parts[1:], request)
            version = parts[3] if parts[2:3] == ["versions"] else None
            rest = parts[4:] if version is not None else parts[2:]
            return self._of_model(parts[1], version, rest, request)
        except NoModelError as error:
            if request.method == "POST" and not self._models.scanned:
                return Job(self.loading, lambda: self._later(request))
            return _no_model(error)

    def _later(self, request: Request) -> Response | Job:
        """Look again after a moment; if the model is still missing, the request goes to the end of the queue."""
        self._models.first_scan.wait(_A_MOMENT)
        return self.route(request)

    def wait_for(self, name: str, version: str | None) -> None:
        """Wait until a model is there or all are loaded, within the time limit of a request."""
        self._models.wait_for(name, version, self.loading.deadline)

    def find(self, name: str, version: str | None) -> tuple[Entry, Loaded]:
        """Return the model with this name, and the bundle that answers now.

        Raises:
            NoModelError: there is no such model, or it cannot answer.
        """
        entry = self._models.get(name, version)
        if entry is None:
            if not self._models.scanned:
                raise NoModelError(503, "the models are still being loaded")
            if several := self._models.versions(name):
                known = ", ".join(one.version for one in several)
                raise NoModelError(404, f"version {str(version)[:80]!r} is not here; here are: {known}")
            there = ", ".join(self._models.names()) or "none"
            raise NoModelError(404, f"no model {name[:80]!r} is installed; installed are: {there}")
        if entry.model is None:
            raise NoModelError(503, f"the model {name!r} is not ready: {entry.error}")
        try:
            loaded = entry.model.loaded()
        except InputError as error:  # it was removed meanwhile
            raise NoModelError(503, f"the model {name!r} is not ready: {error}") from error
        serves = loaded.bundle.config.version
        if version is not None and version != serves:
            raise NoModelError(404, f"version {version[:80]!r} does not serve; {serves!r} does")
        return entry, loaded

    def _of_model(self, name: str, version: str | None, rest: list[str], request: Request) -> Response | Job:
        entry, loaded = self.find(name, version)
        if rest == ["infer"]:
            arrived = perf_counter_ns()
            return Job(entry.workers, lambda: self._kept(name, version, request, arrived, self._infer))
        if rest == ["pipeline"]:
            came = perf_counter_ns()
            return Job(entry.workers, lambda: self._kept(name, version, request, came, self._pipeline))
        if rest == ["ready"]:
            return json_response(200, {"name": name, "ready": True})
        if rest == ["config"]:
            several = len(self._models.versions(name)) > 1
            return json_response(200, descriptions.configuration(name, loaded, several=several))
        if rest == ["stats"]:
            return json_response(200, {"model_stats": self.statistics(name, version)})
        return json_response(200, self.metadata(name, version))

    def metadata(self, name: str, version: str | None) -> dict[str, Any]:
        """Return a model's metadata.

        Raises:
            NoModelError: as in :meth:`find`.
        """
        entry, loaded = self.find(name, version)
        several = self._models.versions(name)
        ready = [one.version for one in several if one.model is not None] if len(several) > 1 else None
        return descriptions.metadata(name, loaded, entry.error, ready)

    def statistics(self, name: str, version: str | None) -> list[dict[str, Any]]:
        """Return the statistics of a model: of one version, or of all that can answer.

        Args:
            name: of the model; empty for all models.

        Raises:
            NoModelError: as in :meth:`find`.
        """
        if name and (version is not None or not self._models.versions(name)):
            entry, loaded = self.find(name, version)
            return [descriptions.statistics(name, entry, loaded)]
        rows = []
        for entry in self._models.versions(name) if name else self._models.entries():
            with contextlib.suppress(InputError):  # it was removed meanwhile
                if entry.model is not None:
                    rows.append(descriptions.statistics(entry.folder.name, entry, entry.model.loaded()))
        if name and not rows:
            self.find(name, version)
        return rows

    def _kept(
        self,
        name: str,
        version: str | None,
        request: Request,
        arrived: int,
        work: Callable[[str, str | None, Request, int], Response | Job],
    ) -> Response | Job:
        """Return the answer that was kept, or do the work and keep its answer."""
        cache = self.cache
        if cache is None:
            return work(name, version, request, arrived)
        begun = perf_counter_ns()
        try:
            entry, loaded = self.find(name, version)
        except NoModelError as error:
            return _no_model(error)
        declared = None if loaded.pipeline is None else loaded.pipeline.pipeline
        if declared is not None and (declared.then is not None or declared.cascade is not None):
            # Its answer depends on other bundles too.
            return work(name, version, request, arrived)
        key = cache.key(loaded.digest, request)
        found = cache.get(key)
        counts, looked = entry.statistics.mine(), perf_counter_ns()
        if found is not None:
            counts.record_hit(samples=found.samples, queue=begun - arrived, look=looked - begun)
            return found.response
        samples = counts.samples
        response = work(name, version, request, arrived)
        if isinstance(response, Job):
            return response
        done = perf_counter_ns()
        now = None if entry.model is None else entry.model.digest
        if now == loaded.digest:
            # Otherwise a switch in between may have answered with the new bundle.
            cache.put(key, response, counts.samples - samples)
        counts.record_miss(looked - begun + perf_counter_ns() - done)
        return response

    def _infer(self, name: str, version: str | None, request: Request, arrived: int) -> Response:
        begun = perf_counter_ns()
        try:
            # Looked up here, not when it was queued: the bundle may have been switched while it waited.
            entry, loaded = self.find(name, version)
        except NoModelError as error:
            return _no_model(error)
        counted = GOLDEN_FIELD not in request.fields
        counts = entry.statistics.mine() if counted else Counts()
        try:
            header = request.fields.get("inference-header-content-length")
            asked = infer_request.from_json(request.body, header, loaded.bundle.config)
            read = perf_counter_ns()
            result = infer_request.run(loaded, asked, counted=counted)
            ran = perf_counter_ns()
            response = answer(name, asked.id, result)
        except BaseException:
            counts.record_failure(perf_counter_ns() - arrived)
            raise
        counts.record(
            samples=samples_of(asked.inputs),
            queue=begun - arrived,
            input=read - begun,
            infer=ran - read,
            output=perf_counter_ns() - ran,
        )
        return response

    def _pipeline(self, name: str, version: str | None, request: Request, arrived: int) -> Response | Job:
        begun = perf_counter_ns()
        try:
            entry, loaded = self.find(name, version)
        except NoModelError as error:
            return _no_model(error)
        answered = pipeline_request.answer(loaded, request, other=lambda other: self._other(entry, other))

        def counted(response: Response) -> Response:
            counts = entry.statistics.mine()
            if response.status == 200:
                counts.record(samples=1, queue=begun - arrived, input=0, infer=perf_counter_ns() - begun, output=0)
            else:
                counts.record_failure(perf_counter_ns() - arrived)
            return response

        if isinstance(answered, Response):
            return counted(answered)
        return Job(self._waiting, lambda: counted(answered()))

    def _other(self, entry: Entry, name: str) -> Callable[[Any], Any]:
        """Return the model to which a pipeline passes its results: the one that is served, not another copy of it.

        Raises:
            InputError: no such model serves.
        """
        other = self._models.get(name)
        if other is None or other.model is None:
            raise InputError(
                f"the pipeline of {entry.folder.name!r} goes on to the model {name!r}, which does not serve"
            )
        return other.model

    def _repository(self, parts: list[str], request: Request) -> Response | Job:
        if parts == ["index"]:
            try:
                only_ready = bool(request.body) and json_tensors.parse(request.body, ()).get("ready") is True
            except InputError as error:
                return error_response(400, str(error))
            return json_response(200, self.index(only_ready=only_ready))
        name, verb = parts[1], parts[-1]
        versions = repository.specific(parts[3]) if parts[2] == "versions" else None
        if verb == "load" and request.body and versions is None:
            versions = repository.asked(request.body)
        entry = self._models.get(name)
        if self._fleet or entry is None:
            return self.change_repository(name, verb, versions)
        return Job(entry.workers, lambda: self.change_repository(name, verb, versions))

    def change_repository(self, name: str, verb: str, versions: repository.Versions | None = None) -> Response:
        """Load or unload a model, which may take a while.

        Args:
            verb: ``load`` or ``unload``.
            versions: which of its versions; by default all.
        """
        if self._fleet:
            return error_response(403, _FLEET_DECIDES)
        entries = self._models.versions(name)
        if not entries:
            return error_response(404, f"no model {name[:80]!r} is here")
        chosen = entries if versions is None else versions.of(entries)
        if not chosen:
            known = ", ".join(entry.version for entry in entries)
            return error_response(404, f"no such version of {name[:80]!r} is here; here are: {known}")
        errors = []
        for entry in entries:
            if entry in chosen and verb == "load":
                self._models.load(entry)
                if entry.error is not None:
                    errors.append(f"the model {name!r} {entry.version}: {entry.error}")
            elif entry in chosen or (versions is not None and versions.only and verb == "load"):
                self._models.unload(entry)
        return error_response(400, "; ".join(errors)) if errors else json_response(200, {})

    def index(self, *, only_ready: bool = False) -> list[dict[str, str]]:
        """Return every installed model in every version, and whether it can answer."""
        rows = [descriptions.index_row(entry.folder.name, entry) for entry in self._models.entries()]
        return [row for row in rows if not only_ready or row["state"] == "READY"]

    def _server(self) -> Response:
        return json_response(200, descriptions.server_metadata())

    def _ready(self) -> Response:
        reason = self.not_ready()
        return json_response(200, {"ready": True}) if reason is None else _not_ready(reason)

    def not_ready(self) -> str | None:
        """Return why not all models are ready, or None if they are."""
        if not self._models.scanned:
            return "the models are still being loaded"
        failed = [
            f"{entry.folder.name}: {entry.error}"
            for entry in self._models.entries()
            if entry.model is None and not entry.unloaded
        ]
        return "; ".join(failed) or None

    def _all_statistics(self) -> Response:
        return json_response(200, {"model_stats": self.statistics("", None)})


def answer(name: str, identifier: str, result: InferResult) -> Response:
    """Return the response to an inference request as JSON, followed by binary tensors if the client asked for them."""
    tensors: list[dict[str, Any]] = []
    binary: list[bytes | memoryview] = []
    for output, array in result.outputs:
        try:
            tensors.append(_tensor(output, array, binary))
        except ValueError as error:
            why = f"output {output.name!r} holds {error}, which JSON cannot say; ask for it as binary data"
            return error_response(422, why)
    content: dict[str, Any] = {"model_name": name, "model_version": result.version, "outputs": tensors}
    if identifier:
        content["id"] = identifier
    if result.conversions:
        content["parameters"] = {"converted": "; ".join(f"{key}: {how}" for key, how in result.conversions.items())}
    encoded = json_tensors.encoded(content)
    if not binary:
        return Response(200, encoded)
    fields = ((_HEADER_LENGTH, str(len(encoded))),)
    return Response(200, [encoded, *binary], "application/octet-stream", fields)


def _tensor(output: RequestedOutput, array: Array, binary: list[bytes | memoryview]) -> dict[str, Any]:
    described: dict[str, Any] = {"name": output.name, "datatype": datatype_of(array), "shape": list(array.shape)}
    if output.binary:
        raw = binary_tensors.bytes_of(array)
        described["parameters"] = {"binary_data_size": len(raw)}
        binary.append(raw)
    else:
        described["data"] = json_tensors.data_of(array)
    return described


def samples_of(inputs: dict[str, Array]) -> int:
    """Return the number of samples in a request: the length of the first axis."""
    first = next(iter(inputs.values()), None)
    return 1 if first is None or not first.ndim else int(first.shape[0])


def _no_model(error: NoModelError) -> Response:
    return unavailable(error.text) if error.status == 503 else error_response(error.status, error.text)


def _not_ready(reason: str) -> Response:
    return json_response(503, {"ready": False, "error": reason}, (("Retry-After", "1"),))
