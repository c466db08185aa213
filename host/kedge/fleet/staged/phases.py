"""The names of where a staged rollout and its devices stand."""

from __future__ import annotations

import enum


class Phase(str, enum.Enum):
    """The phase of a staged rollout."""

    QUEUED = "queued"  # other rollouts have some of its devices
    SCHEDULED = "scheduled"  # its time has not come
    SHADOWING = "shadowing"  # the devices of the first wave run the new bundle beside the old one
    RUNNING = "running"  # the devices of a wave are being updated
    SOAKING = "soaking"  # all of them have answered or are overdue; the gates watch
    HOLDING = "holding"  # a person must promote or abort
    REVERTING = "reverting"  # it was aborted, and its devices go back
    DONE = "done"  # every device serves
    INCOMPLETE = "incomplete"  # all waves have passed, and some devices failed or stay silent
    ABORTED = "aborted"
    SUPERSEDED = "superseded"  # newer rollouts have all of its devices


ENDED = frozenset({Phase.DONE, Phase.INCOMPLETE, Phase.ABORTED, Phase.SUPERSEDED})


class Step(str, enum.Enum):
    """The step of one device in a staged rollout."""

    WAITING = "waiting"  # it has not been told yet, or is to be told again
    SHADOWING = "shadowing"  # it was told to run the new bundle beside the old one
    UPDATING = "updating"  # it was told
    SERVING = "serving"  # it said that it serves
    FAILED = "failed"  # it said that it cannot
    SILENT = "silent"  # it did not say in time
    GONE = "gone"  # a newer rollout has it
    REVERTING = "reverting"  # it was told to go back
    REVERTED = "reverted"  # it said that it went back


REACHED = frozenset({Step.UPDATING, Step.SERVING, Step.FAILED, Step.SILENT})
"""Steps of devices that are to run the new bundle; see also :attr:`.states.Member.reached`."""
