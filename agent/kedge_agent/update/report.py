"""The reported state of a model's update."""

from __future__ import annotations

from kedge_agent.update.fetch import Fetches
from kedge_agent.update.model_update import ModelUpdate
from kedge_protocol.messages import Latency, ModelState, ReportedModel, ReportedShadow, Served


def reported_model(
    update: ModelUpdate,
    fetches: Fetches,
    latency: Latency | None,
    now: float,
    served: Served | None = None,
    shadow: ReportedShadow | None = None,
) -> ReportedModel:
    """Return the reported state of one model.

    Args:
        fetches: the running fetches.
        latency: the stored latency of the model's calls.
        now: seconds of the monotonic clock.
        served: what the desired bundle answered; None unless it serves.
        shadow: what runs beside it.
    """
    state, detail = update.step.value
    detail = update.detail or detail
    if update.step.fetching:
        waiting = _waits_for(update.name, fetches, now)
        state, detail = (ModelState.WAITING, waiting) if waiting else (state, _fetching(update.name, fetches) or detail)
    there = update.installed
    return ReportedModel(
        state=state,
        desired=update.digest,
        digest=there.current,
        version=there.version,
        previous=there.previous,
        # Only a bundle whose golden vectors held here becomes current.
        proved=there.current is not None,
        blocks_done=update.blocks_done,
        blocks_total=update.blocks_total,
        bytes_received=update.received,
        failure=update.failure,
        detail=detail,
        latency=latency if latency is not None and latency.bundle == there.current else None,
        served=served,
        shadow=shadow,
    )


def _waits_for(name: str, fetches: Fetches, now: float) -> str | None:
    traffic = fetches.traffic
    if not traffic.ready:
        return "the controller is away"
    if traffic.cut_off:
        return (
            "small answers come and whole blocks do not; asked again. A broker that takes no messages of 66 KB drops"
            " them (mosquitto: message_size_limit, max_packet_size)"
        )
    if traffic.vain:
        return "the controller does not answer; asked again"
    transfers = [fetch.transfer for fetch in fetches.of(name) if fetch.transfer is not None]
    if transfers and all(transfer.paused_until > now for transfer in transfers):
        return "the controller is busy"
    return None


def _fetching(name: str, fetches: Fetches) -> str | None:
    return ", ".join(sorted({fetch.stage.value for fetch in fetches.of(name)})) or None
