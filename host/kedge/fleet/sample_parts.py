"""The devices' parts of requests for samples in the database: what they say of them, and how they end."""

from __future__ import annotations

from kedge.fleet import rollouts
from kedge.fleet.database import Session
from kedge_protocol.messages import Reported
from kedge_protocol.samples import SampleState

ASKED, COLLECTING, SENDING = "asked", "collecting", "sending"
DONE, REFUSED, FAILED, SILENT, CANCELLED = "done", "refused", "failed", "silent", "cancelled"
OPEN = (ASKED, COLLECTING, SENDING)
MAX_DETAIL = 400
"""Characters."""

_SAID = """
UPDATE sample_part SET state = :state, seen = :seen, kept = :kept, detail = :detail
WHERE device_id = :device AND state IN ('asked', 'collecting', 'sending')
  AND request_id = (SELECT id FROM sample_request WHERE rid = :rid)
"""
_ENDS = {SampleState.REFUSED: REFUSED, SampleState.FAILED: FAILED}


def note(session: Session, device: int, reported: Reported) -> None:
    """Record what a device's report says of the samples that it is asked for."""
    for told in reported.samples.values():
        values = {
            "device": device,
            "rid": told.rid,
            "seen": max(0, told.seen),
            "kept": max(0, told.kept),
            "detail": (told.detail or "")[:MAX_DETAIL],
        }
        # It is done once the controller has the samples, or once there are none.
        empty = told.state is SampleState.DONE and told.kept == 0
        on_its_way = COLLECTING if told.state is SampleState.COLLECTING else SENDING
        state = _ENDS.get(told.state, DONE if empty else on_its_way)
        if session.run(_SAID, values | {"state": state}) and state not in OPEN:
            over(session, [device])


def over(session: Session, numbers: list[int]) -> None:
    """Let devices know that nothing more is asked of them, and close requests that no device works on any more."""
    rollouts.publish(session, numbers)
    session.run(
        "UPDATE sample_request SET state = 'ended' WHERE state = 'open' AND NOT EXISTS (SELECT 1 FROM sample_part"
        " WHERE request_id = sample_request.id AND sample_part.state IN ('asked', 'collecting', 'sending'))"
    )
