"""The verbs of :class:`kedge.fleet.service.FleetService` that concern rollouts."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping

from kedge.fleet import assigning, audit, releases, rollout_status, rollouts
from kedge.fleet.database import Database, Session
from kedge.fleet.results import RolloutPlan, RolloutStarted, RolloutStatus, RolloutSummary
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.staged import engine, orders, planning, records
from kedge.fleet.staged.orders import Outcome
from kedge.fleet.staged.policy import OnAbort, Policy
from kedge.fleet.staged.records import Staged
from kedge.fleet.storage import Repository
from kedge_protocol.errors import FleetError, StorageError

WAIT_SECONDS = 0.25
"""Seconds between two polls while a caller waits."""


class RolloutVerbs:
    """Rollouts of a fleet.

    Attributes:
        actor: who acts, for the audit log.
    """

    actor: str
    database: Database
    repository: Repository

    def rollout_plan(
        self, reference: str, select: Mapping[str, str] | None = None, *, policy: Policy | None = None
    ) -> RolloutPlan:
        """Return what :meth:`rollout_start` would do: which device is in which wave, and how many bytes will move.

        Raises:
            ConfigError, FleetError: as of :meth:`rollout_start`.
        """
        wanted = planning.selecting(policy or Policy(), select or {})
        with self.database.read() as session:
            return planning.plan(session, self.repository, reference, wanted)

    def rollout_start(
        self, reference: str, select: Mapping[str, str] | None = None, *, policy: Policy | None = None
    ) -> RolloutStarted:
        """Roll a release out. Running rollouts of the same model are superseded on these devices and continue on
        others.

        Args:
            reference: ``NAME:VERSION``.
            select: labels that a device must carry, all of them; None for every device.
            policy: how it goes out, in which waves and by which gates; without one, to all devices at once.

        Returns:
            The rollout, and the selected devices that it cannot reach because the release has no bundle for them.

        Raises:
            ConfigError: the policy does not fit.
            FleetError: no such release, no such device, or no bundle for any of them.
            StorageError: a blob of the release is not there, as after a restore.
        """
        labels = dict(select or {})
        if policy is None:
            with self.database.write() as session:
                number, skipped = assigning.start(session, reference, labels)
                self._check_blobs(session, rollouts.blobs(session, number))
                self._note(session, "rollout.start", f"rollout {number}", release=reference, select=labels)
            return RolloutStarted(rollout=self.rollout_status(number), skipped=skipped)
        wanted = planning.selecting(policy, labels)
        with self.database.write() as session:
            release = releases.find(session, reference)
            self._check_blobs(session, rollouts.blobs_of_release(session, release["id"]))
            number, skipped = planning.start(session, release, wanted, labels, now=session.now())
            self._note(session, "rollout.start", f"rollout {number}", release=reference, select=labels, policy=wanted)
        return RolloutStarted(rollout=self.rollout_status(number), skipped=skipped)

    def rollout_status(
        self, rollout: int | None = None, *, wait: float = 0.0, shown: DeviceFilter | None = None
    ) -> RolloutStatus:
        """Return a rollout with the progress of each device.

        Args:
            rollout: its number; None for the latest.
            wait: seconds to wait until it is superseded, was aborted, or every device is done or has failed.
            shown: which of its devices to tell; None for all.

        Raises:
            FleetError: there is none.
        """
        deadline = time.monotonic() + wait
        number = rollout
        while True:
            since = time.monotonic()
            with self.database.read() as session:
                status = rollout_status.status(session, rollouts.find(session, number), shown or DeviceFilter())
            number = status.id
            left = deadline - time.monotonic()
            if rollout_status.is_settled(status) or left <= 0:
                return status
            # A look at a large fleet costs something: most of the time is spent waiting.
            time.sleep(min(max(WAIT_SECONDS, 10 * (time.monotonic() - since)), left))

    def rollouts(self, *, limit: int | None = None) -> tuple[RolloutSummary, ...]:
        """Return rollouts with their counts, newest first.

        Args:
            limit: so many; None for all.
        """
        with self.database.read() as session:
            rows = session.rows("SELECT * FROM rollout ORDER BY id DESC LIMIT ?", (-1 if limit is None else limit,))
            return tuple(rollout_status.summary(session, row) for row in rows)

    def rollout_revert(self, rollout: int | None = None) -> RolloutStatus:
        """Revert a rollout: give each device its previous desired bundle back, unless a newer rollout has taken the
        device over. This is itself a rollout and can be reverted. A staged rollout that goes on is aborted by it.

        Args:
            rollout: its number; None for the latest.

        Raises:
            FleetError: there is none, or it was superseded on every device, or what it would bring back was removed.
            StorageError: a blob of what it would bring back is not there, as after a restore.
        """
        with self.database.write() as session:
            old = rollouts.find(session, rollout)
            staged = records.load(session, old["id"])
            number = rollouts.revert(session, old["id"]) if staged is None else self._take_back(session, staged)
            self._check_blobs(session, rollouts.blobs(session, number))
            self._note(session, "rollout.revert", f"rollout {number}", reverts=old["id"])
        return self.rollout_status(number)

    def rollout_pause(self, rollout: int | None = None) -> RolloutStatus:
        """Pause a staged rollout: nothing new begins. Devices that were told go on, and the gates go on watching.

        Args:
            rollout: its number; None for the latest. So in all verbs of rollouts.

        Raises:
            FleetError: there is none, it is a plain one, it is paused, or it has ended.
        """
        return self._ordered(rollout, lambda session, one, now: orders.pause(one.policy, one.state, now))

    def rollout_resume(self, rollout: int | None = None) -> RolloutStatus:
        """Let a paused rollout go on.

        Raises:
            FleetError: there is none, it is a plain one, or it is not paused.
        """
        return self._ordered(rollout, lambda session, one, now: orders.resume(one.policy, one.state, now))

    def rollout_abort(
        self, rollout: int | None = None, *, on_abort: OnAbort | None = None, reason: str = ""
    ) -> RolloutStatus:
        """Abort a staged rollout: no further device is told, and those that were told go back, or keep what they have.

        Args:
            on_abort: in place of the policy's.
            reason: for the audit log.

        Raises:
            FleetError: there is none, it is a plain one, it has ended, or what it would bring back was removed.
        """
        why = f"{self.actor}: {reason}" if reason else f"by {self.actor}"
        return self._ordered(
            rollout, lambda session, one, now: orders.abort(one.policy, one.state, now, reason=why, how=on_abort)
        )

    def rollout_promote(self, rollout: int | None = None) -> RolloutStatus:
        """Begin the next wave of a staged rollout now, or end it after the last.

        Raises:
            FleetError: there is none, it is a plain one, it is paused, or no wave is under way.
        """
        return self._ordered(rollout, lambda session, one, now: orders.promote(one.policy, one.state, now))

    def rollout_retry(self, rollout: int | None = None, devices: Collection[str] | None = None) -> RolloutStatus:
        """Tell devices of a staged rollout again that failed or are silent.

        Args:
            devices: only these, by name.

        Raises:
            FleetError: there is none, it is a plain one, it goes back, or none of these has failed or is silent.
        """

        def retried(session: Session, one: Staged, now: float) -> Outcome:
            chosen = None if devices is None else records.numbers(session, one, devices)
            return orders.retry(one.policy, one.state, now, chosen)

        return self._ordered(rollout, retried)

    def _ordered(self, rollout: int | None, order: Callable[[Session, Staged, float], Outcome]) -> RolloutStatus:
        with self.database.write() as session:
            row = rollouts.find(session, rollout)
            staged = records.load(session, row["id"])
            if staged is None:
                raise FleetError(
                    f"rollout {row['id']} has no waves: all of its devices were told at once",
                    remedy="Take it back: kedge rollout revert",
                )
            self._apply(session, staged, lambda: order(session, staged, session.now()))
        return self.rollout_status(staged.id)

    def _apply(self, session: Session, staged: Staged, decide: Callable[[], Outcome]) -> int | None:
        try:
            after, actions = decide()
        except FleetError as error:
            raise FleetError(f"rollout {staged.id}: {error.what}", remedy=error.remedy) from error
        begun = engine.apply(session, staged, after, actions, actor=self.actor).revert
        if begun is None or begun == staged.revert:
            return None
        self._check_blobs(session, rollouts.blobs(session, begun))
        return begun

    def _take_back(self, session: Session, staged: Staged) -> int:
        why = f"reverted by {self.actor}"
        begun = self._apply(
            session,
            staged,
            lambda: orders.abort(staged.policy, staged.state, session.now(), reason=why, how=OnAbort.REVERT),
        )
        if begun is None:
            raise FleetError(
                f"rollout {staged.id} has reached no device, there is nothing to revert",
                remedy=f"Stop it: kedge rollout abort {staged.id}",
            )
        return begun

    def _check_blobs(self, session: Session, blobs: Mapping[str, int]) -> None:
        """Refuse a rollout whose blobs are missing, since every device would ask in vain."""
        if missing := self.repository.missing(blobs):
            raise StorageError(
                f"{len(missing)} of the blobs that devices would pull are not there, such as {missing[0]}",
                where=str(self.repository.blob_path(missing[0])),
                remedy="Publish the release again: kedge publish OUT",
            )

    def _note(self, session: Session, action: str, subject: str, **evidence: object) -> None:
        audit.append(session, self.actor, action, subject, evidence)
