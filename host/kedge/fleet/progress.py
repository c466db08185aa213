"""Where a device stands, judged from what it reported and nothing else.

A device is done only when it says that it serves this very bundle, that the bundle passed its golden vectors there,
and that it says so in answer to this desired version or a later one. What a broker acknowledged counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge.fleet.results import Progress
from kedge_protocol.messages import DesiredRefusal, ModelState, Reported


@dataclass(frozen=True)
class Standing:
    """The judgement; see :class:`kedge.fleet.results.DeviceRollout` for the fields."""

    progress: Progress
    detail: str = ""
    serving: str | None = None
    blocks_done: int = 0
    blocks_total: int = 0


def contradiction(reported: Reported | None, version: int, content: str) -> str | None:
    """What stands between this controller and a device and will not end by itself, in words.

    Args:
        reported: the device's last report.
        version: desired version that the device is given now, after all outbidding.
        content: of that desired state, see :attr:`kedge_protocol.messages.Desired.content`.
    """
    if reported is None:
        return None
    if reported.desired_version > version:
        return (
            f"it answers desired version {reported.desired_version}, this controller gave {version}: another controller"
            " speaks to it. Stop that one and roll out again"
        )
    refused = reported.refused
    if refused is None or (refused.version, refused.came) != (version, content):
        return None
    if refused.reason is DesiredRefusal.JUMP:
        return (
            f"it refuses desired version {version}, which is too far above its own {reported.desired_version}. "
            "Remove its agent.json and start it anew"
        )
    return (
        f"it holds desired version {version} with other content ({refused.held[:19]}, not {refused.came[:19]}): another"
        " controller speaks to it. Stop that one and roll out again"
    )


def judge(*, model: str, wanted: str | None, version: int, reported: Reported | None, online: bool) -> Standing:
    """Where a device stands.

    Args:
        model: its name.
        wanted: bundle digest; None where the model is to be taken away.
        version: desired version that first asked for it.
        reported: the device's last report.
        online: its presence.
    """
    known = None if reported is None else reported.models.get(model)
    serving = None if known is None else known.digest
    answers = reported is not None and reported.desired_version >= version
    if wanted is None:
        if answers and serving is None:
            return Standing(Progress.DONE)
        return Standing(Progress.PENDING if online else Progress.OFFLINE, serving=serving)
    if answers and known is not None:
        if known.state is ModelState.SERVING and serving == wanted and known.proved:
            return Standing(Progress.DONE, known.detail or "", serving)
        failure = known.failure
        if known.state is ModelState.FAILED and failure is not None and failure.digest == wanted:
            return Standing(Progress.FAILED, f"{failure.stage}: {failure.reason}", serving)
    if not online:
        detail = "it was never heard of" if reported is None else "it is away"
        return Standing(Progress.OFFLINE, detail, serving)
    if not answers:
        return Standing(Progress.PENDING, "it has not answered yet", serving)
    if known is None or known.desired != wanted:
        return Standing(Progress.PENDING, "", serving)
    if known.state is ModelState.FETCHING:
        return Standing(Progress.FETCHING, known.detail or "", serving, known.blocks_done, known.blocks_total)
    if known.state in (ModelState.PROVING, ModelState.SWITCHING):
        return Standing(Progress.PROVING, known.detail or "", serving, known.blocks_done, known.blocks_total)
    return Standing(Progress.PENDING, known.detail or "", serving, known.blocks_done, known.blocks_total)
