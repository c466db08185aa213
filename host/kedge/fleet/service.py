"""The one room of the fleet's verbs: the command line calls it, the controller reconciles from what it wrote."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from kedge.fleet import devices, kit, releases, rollouts
from kedge.fleet.database import Database, state_folder
from kedge.fleet.results import (
    DeviceDetail,
    DeviceView,
    Measurements,
    Published,
    ReleaseView,
    RolloutStarted,
    RolloutStatus,
    TransferView,
)
from kedge.repository.store import Repository
from kedge_protocol.bundle.layout import Layout


class FleetService:
    """The fleet of one state folder. Usable from several threads and processes at once.

    Args:
        state: the folder; None for :func:`kedge.fleet.database.state_folder`'s choice.

    Raises:
        StorageError: the folder cannot be written.
        FleetError: its database is of another version of Kedge.
    """

    def __init__(self, state: Path | None = None) -> None:
        self.state = state_folder(state)
        self.database = Database(self.state)
        self.repository = Repository(self.state)

    def close(self) -> None:
        """Give the database back."""
        self.database.close()

    def __enter__(self) -> FleetService:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Devices.

    def device_add(
        self,
        name: str,
        target: str,
        labels: Mapping[str, str] | None = None,
        *,
        options: kit.KitOptions | None = None,
    ) -> DeviceView:
        """Make a device known. It is served from then on; nothing changes on it before a rollout.

        Args:
            name: as in its ``agent.toml``.
            target: a known target's name or the path of a ``.toml`` file.
            labels: for ``--select``.
            options: what makes its board ready is written too, see :func:`kedge.fleet.kit.write`; where that fails no
                device is added.

        Raises:
            FleetError: there is a device of this name.
            TargetError: unknown target.
            ConfigError: a name, a label or a credential that cannot be used.
            StorageError: the kit cannot be written.
        """
        options = options or kit.KitOptions()
        options.check()
        with self.database.write() as session:
            added = devices.view(devices.add(session, name, target, labels or {}))
            if options.kit is not None:
                kit.write(name, target, options)
            return added

    def devices(self, select: Mapping[str, str] | None = None) -> tuple[DeviceView, ...]:
        """All devices that carry these labels, by name."""
        with self.database.read() as session:
            return tuple(devices.view(device) for device in devices.selected(session, select or {}))

    def device(self, name: str) -> DeviceDetail:
        """One device with its transfers and its latest telemetry.

        Raises:
            FleetError: there is none.
        """
        with self.database.read() as session:
            device = devices.find(session, name)
            return DeviceDetail(
                device=devices.view(device),
                transfers=devices.transfers(session, device),
                telemetry=devices.telemetry(session, device),
            )

    def device_remove(self, name: str) -> None:
        """Forget a device; its retained desired state is cleared at the broker. What it serves it goes on serving.

        Raises:
            FleetError: there is none.
        """
        with self.database.write() as session:
            devices.remove(session, name)

    def latencies(self, target: str | None = None) -> Measurements:
        """What devices measured when they proved their bundles: for each device and bundle its latest proof.

        Args:
            target: only of devices of this target (its name).
        """
        with self.database.read() as session:
            return Measurements(measurements=devices.latencies(session, target))

    def transfers(self, name: str) -> tuple[TransferView, ...]:
        """What a device was sent, by blob.

        Raises:
            FleetError: there is no such device.
        """
        with self.database.read() as session:
            return devices.transfers(session, devices.find(session, name))

    # Releases.

    def publish(self, layout: Path) -> Published:
        """Take a release in: every blob is checked by digest and copied, its block map written and checked against the
        manifest. Publishing the same release again changes nothing.

        Args:
            layout: the folder that ``kedge compile -o`` wrote.

        Raises:
            BundleError: not a release, or something in it is not as it says; see
                :meth:`kedge.repository.store.Repository.add`.
            FleetError: the name and version are taken by another release.
            StorageError: no space.
        """
        opened = Layout(layout)
        found = opened.release()
        with self.database.read() as session:
            releases.refuse_conflict(session, found.name, found.version, found.digest)
        stored = self.repository.add(opened)
        added = {blob.digest: blob.size for item in stored.bundles.values() for blob in item.blobs if blob.added}
        with self.database.write() as session:
            known = releases.refuse_conflict(session, stored.name, stored.version, stored.digest)
            release = known or releases.record(session, stored)
            return Published(
                release=releases.view(session, release),
                new=known is None,
                blobs_added=len(added),
                bytes_added=sum(added.values()),
            )

    def releases(self) -> tuple[ReleaseView, ...]:
        """All published releases, oldest first."""
        with self.database.read() as session:
            return tuple(releases.view(session, release) for release in releases.everything(session))

    # Rollouts.

    def rollout_start(self, reference: str, select: Mapping[str, str] | None = None) -> RolloutStarted:
        """Want a release on all selected devices at once. A rollout of the same model that is under way is superseded.

        Args:
            reference: ``NAME:VERSION``.
            select: labels that a device must carry, all of them; None for every device.

        Returns:
            The rollout, and the selected devices that it cannot reach because the release has no bundle for them.

        Raises:
            FleetError: no such release, no such device, or no bundle for any of them.
        """
        with self.database.write() as session:
            rollout, skipped = rollouts.start(session, reference, select or {})
            return RolloutStarted(rollout=rollouts.status(session, rollout), skipped=skipped)

    def rollout_status(self, rollout: int | None = None, *, wait: float = 0.0) -> RolloutStatus:
        """A rollout with each device's standing.

        Args:
            rollout: its number; None for the latest.
            wait: seconds to wait until it is superseded or every device is done or has failed.

        Raises:
            FleetError: there is none.
        """
        deadline = time.monotonic() + wait
        number = rollout
        while True:
            with self.database.read() as session:
                status = rollouts.status(session, rollouts.find(session, number))
            number = status.id
            left = deadline - time.monotonic()
            if rollouts.is_settled(status) or left <= 0:
                return status
            time.sleep(min(0.25, left))

    def rollout_revert(self, rollout: int | None = None) -> RolloutStatus:
        """Want again what each device was to have before a rollout; itself a rollout, which can be reverted.

        Args:
            rollout: its number; None for the latest.

        Raises:
            FleetError: there is none, or it was superseded.
        """
        with self.database.write() as session:
            return rollouts.status(session, rollouts.revert(session, rollout))
