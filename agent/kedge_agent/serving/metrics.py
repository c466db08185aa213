"""``/metrics``: this process's counters in the text format of Prometheus (version 0.0.4)."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from kedge_agent.serving.handler import Handler, Job, Request, Response
from kedge_agent.serving.model_pool import Entry, ServedModels
from kedge_agent.serving.statistics import bounds
from kedge_protocol import memory
from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    from kedge_targets.pipeline.cascades import CascadeCounts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class MetricsHandler(Handler):
    """Answers ``/metrics``.

    Args:
        models: the models whose requests are counted.
    """

    def __init__(self, models: ServedModels) -> None:
        self._models = models

    def methods(self, path: str) -> Sequence[str]:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        return ("GET",) if path == "/metrics" else ()

    def route(self, request: Request) -> Response | Job:
        """See :class:`kedge_agent.serving.handler.Handler`."""
        text = "\n".join(self._lines()) + "\n"
        return Response(200, text.encode(), CONTENT_TYPE)

    def _lines(self) -> Iterator[str]:
        entries = [(_named(self._models, entry), entry) for entry in self._models.entries()]
        yield from _process()
        yield from _family("kedge_model_ready", "gauge", "1 where the model answers.")
        for name, entry in entries:
            yield f"kedge_model_ready{_labels(name)} {int(entry.model is not None)}"
        yield from _family("kedge_requests_total", "counter", "Inference requests, by what became of them.")
        for name, entry in entries:
            counts, workers = entry.statistics.total(), entry.workers
            for outcome, count in (("ok", counts.answered), ("error", counts.failed), ("refused", workers.refused)):
                yield f"kedge_requests_total{_labels(name, outcome=outcome)} {count}"
        yield from _family("kedge_samples_total", "counter", "Samples in the answered requests.")
        for name, entry in entries:
            yield f"kedge_samples_total{_labels(name)} {entry.statistics.total().samples}"
        yield from _family("kedge_cache_lookups_total", "counter", "Requests whose answer may have been kept.")
        for name, entry in entries:
            counts = entry.statistics.total()
            for found, count in (("hit", counts.cache_hits), ("miss", counts.cache_misses)):
                yield f"kedge_cache_lookups_total{_labels(name, found=found)} {count}"
        cascades = [(name, entry.model.cascade) for name, entry in entries if entry.model is not None]
        yield from _cascades([(name, found) for name, found in cascades if found is not None])
        yield from _family("kedge_queue_length", "gauge", "Requests that wait for a thread of the model.")
        for name, entry in entries:
            yield f"kedge_queue_length{_labels(name)} {entry.workers.waiting}"
        yield from _family("kedge_request_seconds", "histogram", "From a request's arrival to its answer.")
        for name, entry in entries:
            yield from _histogram(name, entry)
        yield from _generation(entries)


def _named(models: ServedModels, entry: Entry) -> dict[str, str]:
    """Return the labels of a model: its name, and its version where it is here in several."""
    name = entry.folder.name
    return {"model": name, "version": entry.version} if len(models.versions(name)) > 1 else {"model": name}


def _cascades(found: Sequence[tuple[dict[str, str], CascadeCounts]]) -> Iterator[str]:
    if not found:
        return
    yield from _family("kedge_cascade_items_total", "counter", "Items of cascades, by what became of them.")
    for name, counts in found:
        for outcome, count in asdict(counts).items():
            if outcome != "under_way":
                yield f"kedge_cascade_items_total{_labels(name, outcome=outcome)} {count}"
    yield from _family("kedge_cascade_under_way", "gauge", "Calls of the larger model that have not ended.")
    for name, counts in found:
        yield f"kedge_cascade_under_way{_labels(name)} {counts.under_way}"


def _generation(entries: Sequence[tuple[dict[str, str], Entry]]) -> Iterator[str]:
    """Yield the figures of language models; nothing of generation is imported where there are none."""
    engines = []
    for name, entry in entries:
        with contextlib.suppress(InputError):
            loaded = None if entry.model is None else entry.model.loaded()
            if loaded is not None and loaded.bundle.config.generation is not None:
                engines.append((name, loaded.generator.engine))
    if engines:
        from kedge_agent.generation import metrics

        yield from metrics.lines(engines, _family, _labels)


def _histogram(name: dict[str, str], entry: Entry) -> Iterator[str]:
    counts = entry.statistics.total()
    sum_so_far = 0
    for bound, count in zip([*map(repr, bounds()), "+Inf"], counts.buckets, strict=True):
        sum_so_far += count
        yield f"kedge_request_seconds_bucket{_labels(name, le=bound)} {sum_so_far}"
    yield f"kedge_request_seconds_sum{_labels(name)} {counts.answered_ns / 1e9!r}"
    yield f"kedge_request_seconds_count{_labels(name)} {sum_so_far}"


def _process() -> Iterator[str]:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield from _family("process_cpu_seconds_total", "counter", "CPU time of the serving process, seconds.")
    yield f"process_cpu_seconds_total {usage.ru_utime + usage.ru_stime!r}"
    yield from _family("process_resident_memory_bytes", "gauge", "Resident memory of the serving process.")
    yield f"process_resident_memory_bytes {memory.resident() or 0}"


def _family(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"


def _labels(model: dict[str, str], **more: str) -> str:
    labels = {**model, **more}
    inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    return f"{{{inner}}}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
