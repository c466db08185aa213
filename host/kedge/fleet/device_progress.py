"""Judges a device's progress from its reports alone.

A device is done only when it says that it serves this very bundle, that the bundle passed its golden vectors there,
that it has served since: calls of users, or golden samples through the served endpoint; and that it says so in answer
to this desired version or a later one. An older agent does not say whether it has served, and is believed without it.
What a broker acknowledged counts for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from kedge.fleet.results import Progress
from kedge_protocol.messages import DesiredRefusal, ModelState, RefusedDesired, ReportedModel, Served

NAMESAKE = "two devices use this name and throw each other off the broker: give one of them another"


@dataclass(frozen=True)
class Standing:
    """A device's progress; see :class:`kedge.fleet.results.DeviceRollout` for the fields."""

    progress: Progress
    detail: str = ""
    serving: str | None = None
    blocks_done: int = 0
    blocks_total: int = 0
    served: Served | None = None


def contradiction(answered: int | None, refused: RefusedDesired | None, version: int, content: str) -> str | None:
    """Describe a conflict between this controller and a device that will not resolve by itself.

    Args:
        answered: desired version in the device's last report; None before its first.
        refused: what that report says of a desired state that was not taken.
        version: desired version that the device is given now, after all outbidding.
        content: of that desired state, see :attr:`kedge_protocol.messages.Desired.content`.
    """
    if answered is None:
        return None
    if answered > version:
        return (
            f"it answers desired version {answered}, this controller gave {version}: another controller"
            " speaks to it. Stop that one and roll out again"
        )
    if refused is None or (refused.version, refused.came) != (version, content):
        return None
    if refused.reason in _UNTRUSTED:
        return f"it refuses desired version {version}: {_UNTRUSTED[refused.reason]}"
    if refused.reason is DesiredRefusal.OLDER:
        return None
    if refused.reason is DesiredRefusal.JUMP:
        return (
            f"it refuses desired version {version}, which is too far above its own {answered}. "
            "Remove its agent.json and start it anew"
        )
    return (
        f"it holds desired version {version} with other content ({refused.held[:19]}, not {refused.came[:19]}): another"
        " controller speaks to it. Stop that one and roll out again"
    )


_KIT = "make its kit again (kedge device add --kit) and install its trust.json"
_UNTRUSTED = {
    DesiredRefusal.UNSIGNED: "it came unsigned, so another controller speaks to it. Stop that one",
    DesiredRefusal.SIGNATURE: f"it does not trust the key of this controller: {_KIT}",
    DesiredRefusal.DEVICE: "it was given for another device of this name. Compare `name` in its agent.toml",
    DesiredRefusal.RELEASE: f"it does not trust the release's key, or has another target. Publish again, or {_KIT}",
}


@dataclass(frozen=True)
class LastReport:
    """A device's last report about one model.

    Attributes:
        version: the desired version that it answered; None before its first report.
        model: where it said that the model stands; None where it did not speak of it.
        online: its presence.
    """

    version: int | None
    model: ReportedModel | None
    online: bool


def judge(*, wanted: str | None, version: int, told: LastReport) -> Standing:
    """Judge a device's progress.

    Args:
        wanted: bundle digest; None where the model is to be taken away.
        version: desired version that first asked for it.
        told: what it said.
    """
    model = told.model
    serving = None if model is None else model.digest
    answers = told.version is not None and told.version >= version
    if answers and _is_reached(wanted, model):
        if model is None or model.served is None:
            return Standing(Progress.DONE, "" if model is None else model.detail or "", serving)
        if model.served.by is not None:
            detail = "; ".join(filter(None, (served_in_words(model.served), model.detail)))
            return Standing(Progress.DONE, detail, serving, served=model.served)
    failure = None if model is None else model.failure
    is_failed = model is not None and model.state is ModelState.FAILED
    if answers and is_failed and failure is not None and failure.digest == wanted:
        return Standing(Progress.FAILED, f"{failure.stage}: {failure.reason}", serving)
    if not told.online:
        detail = "it was never heard of" if told.version is None else "it is away"
        return Standing(Progress.OFFLINE, detail, serving)
    if not answers:
        return Standing(Progress.PENDING, _unanswered(version, told.version), serving)
    if model is None or wanted is None or model.desired != wanted:
        return Standing(Progress.PENDING, _elsewhere(wanted, model), serving)
    if model.served is not None and _is_reached(wanted, model):
        return Standing(Progress.PROVING, served_in_words(model.served), serving)
    progress = _UNDER_WAY.get(model.state, Progress.PENDING)
    detail = model.detail or ("" if progress is not Progress.PENDING else _waiting(wanted, model))
    return Standing(progress, detail, serving, model.blocks_done, model.blocks_total)


def served_in_words(served: Served) -> str:
    """Return what attests that a bundle serves, or what is waited for."""
    if served.by == "calls":
        return "answered calls of users"
    if served.by == "golden":
        return f"{served.golden} golden samples held through its served endpoint; no user has called yet"
    if served.problem is not None:
        return f"it serves; no user has called yet, and golden samples fail: {served.problem}"
    return "it serves; waits for the first call, or for golden samples through its served endpoint"


_UNDER_WAY = {
    ModelState.FETCHING: Progress.FETCHING,
    ModelState.PROVING: Progress.PROVING,
    ModelState.SWITCHING: Progress.PROVING,
}


def _is_reached(wanted: str | None, model: ReportedModel | None) -> bool:
    if wanted is None:
        return model is None or model.digest is None
    return model is not None and model.state is ModelState.SERVING and model.digest == wanted and model.proved


def _unanswered(version: int, answered: int | None) -> str:
    if answered is None:
        return f"it is there, and has not reported yet (desired version {version})"
    return f"it has not answered desired version {version} yet, only {answered}"


def _elsewhere(wanted: str | None, model: ReportedModel | None) -> str:
    if wanted is None:
        return "it still serves the model"
    if model is None:
        return "it answered, and does not speak of this model"
    return f"it works towards another bundle ({_short(model.desired)})"


def _waiting(wanted: str, model: ReportedModel) -> str:
    if model.state is ModelState.SERVING and model.digest == wanted:
        return "it serves the bundle without having proved it"
    if model.state is ModelState.SERVING:
        return f"it serves another bundle ({_short(model.digest)})"
    if model.state is ModelState.FAILED:
        return "it failed, and does not say with which bundle"
    return "it has not begun yet"


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[7:19]
