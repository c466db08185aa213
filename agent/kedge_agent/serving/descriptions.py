"""What the Open Inference Protocol tells of the server and its models: metadata, configuration, statistics, index."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import kedge_protocol
from kedge_agent.loaded import Loaded
from kedge_agent.serving.datatypes import described
from kedge_agent.serving.model_pool import Entry
from kedge_agent.serving.statistics import Counts
from kedge_protocol.codec import unstructure

EXTENSIONS = ("binary_tensor_data", "classification", "model_configuration", "model_repository", "statistics")


def server_metadata() -> dict[str, Any]:
    """Return the server's metadata."""
    return {"name": "kedge-agent", "version": kedge_protocol.__version__, "extensions": list(EXTENSIONS)}


def metadata(name: str, loaded: Loaded, failure: str | None, versions: Sequence[str] | None = None) -> dict[str, Any]:
    """Return a model's metadata: its inputs and outputs, and how its calls are run.

    Args:
        versions: all that can answer; None for the bundle's own.
    """
    config = loaded.bundle.config
    return {
        "name": name,
        "versions": [config.version] if versions is None else list(versions),
        "platform": f"kedge_{config.backend}",
        "inputs": [described(spec) for spec in config.inputs],
        "outputs": [described(spec) for spec in config.outputs],
        "parameters": {
            "digest": loaded.digest,
            "labels": list(config.labels),
            "failure": failure,
            "calls": None if loaded.plan is None else unstructure(loaded.plan),
        },
    }


def configuration(name: str, loaded: Loaded, *, several: bool = False) -> dict[str, Any]:
    """Return the model's configuration in Triton's form; each shape includes the batch axis. Requests that wait are
    gathered up to the size in ``dynamic_batching``, if it is there.

    Args:
        several: whether the model is here in several versions.
    """
    config, plan = loaded.bundle.config, loaded.plan

    def tensor(spec: dict[str, Any]) -> dict[str, Any]:
        datatype = spec["datatype"]
        kind = "STRING" if datatype == "BYTES" else datatype
        return {"name": spec["name"], "data_type": f"TYPE_{kind}", "dims": spec["shape"]}

    gathers = plan is not None and plan.most > 1
    batching = {"preferred_batch_size": [plan.most], "max_queue_delay_microseconds": 0} if plan and gathers else None
    return {
        "name": name,
        "platform": f"kedge_{config.backend}",
        "backend": config.backend,
        "version_policy": {"all": {}} if several else {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [tensor(described(spec)) for spec in config.inputs],
        "output": [tensor(described(spec)) for spec in config.outputs],
        "instance_group": [{"name": name, "kind": "KIND_CPU", "count": 1 if plan is None else plan.at_once}],
        **({} if batching is None else {"dynamic_batching": batching}),
        "parameters": {
            "target": {"string_value": config.target},
            "precision": {"string_value": config.precision},
            "machine": {"string_value": platform.machine()},
        },
    }


def statistics(name: str, entry: Entry, loaded: Loaded) -> dict[str, Any]:
    """Return a model's statistics under the names of the protocol's extension."""
    counts = entry.statistics.total()

    def of(count: int, nanoseconds: int) -> dict[str, int]:
        return {"count": count, "ns": nanoseconds}

    found = {
        "name": name,
        "version": loaded.version,
        "last_inference": counts.last_ms,
        "inference_count": counts.samples,
        "execution_count": counts.answered,
        "inference_stats": _durations(counts, of),
        "batch_stats": [
            {"batch_size": size, "compute_infer": of(count, nanoseconds)}
            for size, (count, nanoseconds) in sorted(loaded.gathered_sizes.items())
        ],
    }
    cascade = None if entry.model is None else entry.model.cascade
    return found if cascade is None else {**found, "cascade": asdict(cascade)}


def _durations(counts: Counts, of: Callable[[int, int], dict[str, int]]) -> dict[str, Any]:
    return {
        "success": of(counts.answered, counts.answered_ns),
        "fail": of(counts.failed, counts.failed_ns),
        "queue": of(counts.answered, counts.queue_ns),
        "compute_input": of(counts.answered, counts.input_ns),
        "compute_infer": of(counts.answered, counts.infer_ns),
        "compute_output": of(counts.answered, counts.output_ns),
        "cache_hit": of(counts.cache_hits, counts.cache_hit_ns),
        "cache_miss": of(counts.cache_misses, counts.cache_miss_ns),
    }


def index_row(name: str, entry: Entry) -> dict[str, str]:
    """Return a model's entry in the repository index."""
    reason = "unloaded" if entry.unloaded else (entry.error or "")
    return {
        "name": name,
        "version": entry.version,
        "state": "UNAVAILABLE" if entry.model is None else "READY",
        "reason": reason,
    }
