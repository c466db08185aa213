"""Stores a device's report in columns when it arrives, so that queries need not parse it again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kedge_protocol.messages import Latency, Reported, ReportedModel

if TYPE_CHECKING:
    from kedge.fleet.database import Session

_MODEL = """
INSERT OR REPLACE INTO reported_model VALUES
(:device_id, :model, :state, :desired, :digest, :version, :previous, :proved, :blocks_done, :blocks_total,
 :bytes_received, :failure_digest, :failure_stage, :failure_reason, :detail, :served_calls, :served_golden,
 :served_problem)
"""
_TOLD = """
UPDATE device_state
SET told_target = ?, namesake = ?, refused_version = ?, refused_reason = ?, refused_came = ?, refused_held = ?
WHERE device_id = ?
"""
_LATENCY = """
INSERT INTO latency (device_id, bundle, files, target, p50_ms, p95_ms, calls, at)
SELECT :device_id, :bundle, :files, target, :p50_ms, :p95_ms, :calls, :at FROM device WHERE id = :device_id
ON CONFLICT (device_id, bundle) DO UPDATE SET files = excluded.files, target = excluded.target,
    p50_ms = excluded.p50_ms, p95_ms = excluded.p95_ms, calls = excluded.calls, at = excluded.at
WHERE (files, p50_ms, p95_ms, calls) <> (excluded.files, excluded.p50_ms, excluded.p95_ms, excluded.calls)
"""


def note(session: Session, device_id: int, reported: Reported) -> None:
    """Record a device's properties and the state of its models."""
    refused = reported.refused
    told = (None,) * 4 if refused is None else (refused.version, refused.reason.value, refused.came, refused.held)
    session.run(_TOLD, (reported.target, reported.namesake, *told, device_id))
    session.run("DELETE FROM reported_model WHERE device_id = ?", (device_id,))
    if reported.models:
        session.run_many(_MODEL, [_row(device_id, name, model) for name, model in reported.models.items()])


def _row(device_id: int, name: str, model: ReportedModel) -> dict[str, object]:
    failure, served = model.failure, model.served
    return {
        "device_id": device_id,
        "model": name,
        "state": model.state.value,
        "desired": model.desired,
        "digest": model.digest,
        "version": model.version,
        "previous": model.previous,
        "proved": model.proved,
        "blocks_done": _bounded(model.blocks_done),
        "blocks_total": _bounded(model.blocks_total),
        "bytes_received": _bounded(model.bytes_received),
        "failure_digest": None if failure is None else failure.digest,
        "failure_stage": None if failure is None else failure.stage,
        "failure_reason": None if failure is None else failure.reason,
        "detail": model.detail,
        "served_calls": None if served is None else _bounded(served.calls),
        "served_golden": None if served is None else _bounded(served.golden),
        "served_problem": None if served is None else served.problem,
    }


def _bounded(count: int) -> int:
    """Limit a number to the database's range, since JSON allows larger ones."""
    return max(0, min(count, 1 << 53))


def note_latency(session: Session, device_id: int, latency: Latency) -> None:
    """Record a measurement. Every report repeats it, so a known one is left alone."""
    values = {
        "device_id": device_id,
        "bundle": latency.bundle,
        "files": latency.files,
        "p50_ms": latency.p50_ms,
        "p95_ms": latency.p95_ms,
        "calls": latency.calls,
        "at": session.now(),
    }
    session.run(_LATENCY, values)
