"""The fleet service: all operations on a fleet. The command line calls it; the controller acts on the state that it
writes."""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from kedge.fleet import audit, commands, devices, overview, releases
from kedge.fleet.database import Clock, Database, alone, note_change, state_folder
from kedge.fleet.keys import Keys, KeyView, is_signed, sign_again, sign_release
from kedge.fleet.options import KitOptions
from kedge.fleet.overview import DevicePart, DeviceQuery, DevicesFound, FleetOverview
from kedge.fleet.results import (
    CommandQueued,
    DeviceDetail,
    DeviceList,
    DeviceView,
    Measurements,
    Published,
    ReleaseRemoved,
    ReleaseView,
    TransferView,
)
from kedge.fleet.rollout_verbs import WAIT_SECONDS, RolloutVerbs
from kedge.fleet.storage import Repository
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import FleetError
from kedge_protocol.trust import Role

__all__ = ["FleetService"]

REPOSITORY_LOCK = "repository.lock"


class FleetService(RolloutVerbs):
    """The fleet of one state folder. It may be used from several threads and processes at the same time.

    Args:
        state: the folder; None for :func:`kedge.fleet.database.state_folder`'s choice.
        actor: who acts, for the audit log; None for this process's user.
        clock: the fleet's clock, in seconds since 1970; a simulation gives its own.

    Raises:
        StorageError: the folder cannot be written.
        FleetError: its database is of another version of Kedge.
    """

    def __init__(self, state: Path | None = None, *, actor: str | None = None, clock: Clock = time.time) -> None:
        self.actor = actor or audit.person()
        self.state = state_folder(state)
        self.database = Database(self.state, clock=clock)
        self.repository = Repository(self.state)

    def acting_for(self, actor: str) -> FleetService:
        """Return the same fleet for another actor: its verbs stand under this name in the audit log."""
        other = copy.copy(self)
        other.actor = actor
        return other

    def close(self) -> None:
        """Close the database."""
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
        options: KitOptions | None = None,
    ) -> DeviceView:
        """Register a device. The controller serves it from then on; nothing changes on it before a rollout.

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
        options = options or KitOptions()
        options.check()
        if options.kit is not None:
            from kedge.fleet import kit

            # A kit takes its time: nobody has to wait for it, and where it fails nothing is added.
            with self.database.read() as session:
                devices.check_new(session, name, target, labels or {})
            kit.write(name, target, options, Keys(self.state).trust())
        with self.database.write() as session:
            added = devices.view(session, devices.add(session, name, target, labels or {}))
            self._note(session, "device.add", name, target=added.target, labels=added.labels)
        return added

    def device_edit(
        self, name: str, labels: Mapping[str, str] | None = None, without: Collection[str] = ()
    ) -> DeviceView:
        """Change a device's labels. Its desired models stay the same: labels count when a rollout starts.

        Args:
            labels: set, beside those it has.
            without: keys of labels that are removed.

        Raises:
            FleetError: there is no such device.
            ConfigError: a label that cannot be used, or one to be removed that it has not.
        """
        with self.database.write() as session:
            devices.edit(session, name, labels or {}, without)
            self._note(session, "device.edit", name, labels=dict(labels or {}), without=sorted(without))
            return devices.view(session, devices.find(session, name))

    def devices(self, select: Mapping[str, str] | None = None) -> tuple[DeviceView, ...]:
        """Return all devices with these labels, by name, in full."""
        with self.database.read() as session:
            return devices.views(session, devices.select_devices(session, select or {}, extra="reported"))

    def device_list(
        self, select: Mapping[str, str] | None = None, *, limit: int | None = None, offset: int = 0
    ) -> DeviceList:
        """Return the devices with these labels, by name: their number and a short form of each.

        Args:
            limit, offset: so many of them, after so many; None for all.
        """
        with self.database.read() as session:
            rows = devices.select_devices(session, select or {}, extra="reported IS NOT NULL")
            page = rows[offset : None if limit is None else offset + limit]
            online = sum(bool(row["online"]) for row in rows)
            return DeviceList(total=len(rows), online=online, devices=devices.rows_of(session, page))

    def overview(self) -> FleetOverview:
        """Return the fleet in counts: by target, health and release."""
        with self.database.read() as session:
            return overview.overview(session)

    def device_find(self, query: DeviceQuery) -> DevicesFound:
        """Return the devices that a query finds, each in a short form with its health."""
        with self.database.read() as session:
            return overview.find(session, query)

    def device_history(self, name: str) -> tuple[DevicePart, ...]:
        """Return what the latest rollouts wanted of a device, newest first.

        Raises:
            FleetError: there is no such device.
        """
        with self.database.read() as session:
            return overview.history(session, devices.find(session, name))

    def device(self, name: str) -> DeviceDetail:
        """Return one device with its transfers and its latest telemetry.

        Raises:
            FleetError: there is none.
        """
        with self.database.read() as session:
            number = devices.find(session, name)
            return DeviceDetail(
                device=devices.view(session, number),
                transfers=devices.transfers(session, number),
                telemetry=devices.telemetry(session, number),
            )

    def device_report(self, name: str, *, wait: float = 0.0) -> CommandQueued:
        """Ask a device for a fresh report.

        Args:
            wait: seconds to wait for its answer.

        Raises:
            FleetError: there is no such device.
        """
        with self.database.write() as session:
            cid = commands.ask(session, devices.find(session, name), "report")
            note_change(session)
        deadline = time.monotonic() + wait
        while True:
            with self.database.read() as session:
                asked = commands.view(session, cid)
            left = deadline - time.monotonic()
            if asked.ok is not None or left <= 0:
                return asked
            time.sleep(min(WAIT_SECONDS, left))

    def device_remove(self, name: str) -> None:
        """Remove a device and clear its retained desired state at the broker. The device keeps serving its models.

        Raises:
            FleetError: there is none.
        """
        with self.database.write() as session:
            devices.remove(session, name)
            self._note(session, "device.remove", name)

    def latencies(self, target: str | None = None) -> Measurements:
        """Return the latency of each bundle on the devices that proved it, by device.

        Args:
            target: only of devices of this target (its name).
        """
        with self.database.read() as session:
            return Measurements(measurements=devices.latencies(session, target))

    def transfers(self, name: str) -> tuple[TransferView, ...]:
        """Return the transfers to a device, by blob.

        Raises:
            FleetError: there is no such device.
        """
        with self.database.read() as session:
            return devices.transfers(session, devices.find(session, name))

    # Releases.

    def publish(self, layout: Path, *, release_key: Path | None = None) -> Published:
        """Take a release in: every blob is checked by digest and copied, its block map written and checked against the
        manifest. Publishing the same release again changes nothing, but brings back blobs that are missing.

        Args:
            layout: the folder that ``kedge compile -o`` wrote.
            release_key: the key that signs the release; None for the state folder's, which is made on first use.

        Raises:
            BundleError: not a release, or something in it is not as it says; see
                :meth:`kedge.fleet.storage.Repository.add`.
            FleetError: the name and version are taken by another release, or the release key is not there, or is one
                that devices do not trust.
            StorageError: no space.
        """
        opened = Layout(layout)
        found = opened.release()
        keys = Keys(self.state)
        with self.database.read() as session:
            known = releases.refuse_conflict(session, found.name, found.version, found.digest)
        signs = known is None or not is_signed(known["statement"], keys.trust())
        # A key that is given is checked although the release is signed already: it may be meant for the next one too.
        signer = keys.private(Role.RELEASE, release_key) if signs or release_key is not None else None
        # A release that is removed meanwhile must not take a blob along that is found here to be there already.
        with alone(self.state / REPOSITORY_LOCK):
            stored = self.repository.add(opened)
            self.repository.keep_report(opened, stored.digest)
            added = {blob.digest: blob.size for item in stored.bundles for blob in item.blobs if blob.added}
            with self.database.write() as session:
                known = releases.refuse_conflict(session, stored.name, stored.version, stored.digest)
                number = releases.record(session, stored) if known is None else known["id"]
                if signer is not None and signs:
                    releases.keep_statement(session, number, sign_release(releases.statement(stored), signer))
                if known is None:
                    self._note(session, "release.publish", f"{stored.name}:{stored.version}", digest=stored.digest)
                return Published(
                    release=releases.views(session, number)[0],
                    new=known is None,
                    blobs_added=len(added),
                    bytes_added=sum(added.values()),
                )

    def releases(self) -> tuple[ReleaseView, ...]:
        """Return all published releases, oldest first."""
        with self.database.read() as session:
            return releases.views(session)

    def release_remove(self, reference: str) -> ReleaseRemoved:
        """Remove a release and delete the blobs that no other release needs. Devices that serve it keep serving it.

        Args:
            reference: ``NAME:VERSION``.

        Raises:
            FleetError: no such release, or a device shall run it.
            StorageError: a blob cannot be deleted.
        """
        with alone(self.state / REPOSITORY_LOCK):
            with self.database.write() as session:
                release = releases.find(session, reference)
                view = releases.views(session, release["id"])[0]
                releases.remove(session, release)
                releases.forget_blobs(session)
                self._note(session, "release.remove", reference, digest=view.digest)
            with self.database.read() as session:
                kept = releases.blobs(session)
            removed = self.repository.collect(kept)
            self.repository.report_path(view.digest).unlink(missing_ok=True)
        return ReleaseRemoved(release=view, blobs_removed=len(removed), bytes_removed=sum(removed.values()))

    def release_report(self, name: str, version: str) -> bytes:
        """Return the compile report of a release as HTML, as the publisher's folder held it.

        Raises:
            FleetError: no such release, or it was published without a report.
        """
        with self.database.read() as session:
            release = releases.find(session, f"{name}:{version}")
        path = self.repository.report_path(release["digest"])
        if not path.is_file():
            raise FleetError(
                f"{name}:{version} was published without a report",
                remedy="Publish the folder that `kedge compile -o` wrote again",
            )
        return path.read_bytes()

    # Keys.

    def keys(self) -> tuple[KeyView, ...]:
        """Return the keys that devices trust; they are made if there are none."""
        return Keys(self.state).views()

    def key_rotate(self, role: Role, *, release_key: Path | None = None) -> KeyView:
        """Replace a key, see :meth:`kedge.fleet.keys.Keys.rotate`. With a new release key all releases are signed anew.

        Raises:
            FleetError: the release key is not there, or devices do not trust it.
        """
        keys = Keys(self.state)
        with self.database.write() as session:
            made = keys.rotate(role, release_key=release_key)
            if role is Role.RELEASE:
                signer = keys.private(Role.RELEASE)
                for number, signed in releases.statements(session).items():
                    releases.keep_statement(session, number, sign_again(signed, signer))
            session.run("UPDATE device SET desired_version = desired_version + 1 WHERE managed AND NOT removed")
            note_change(session)
            self._note(session, "key.rotate", role.value, key=made.id)
        return made

    # The audit log.

    def audit_log(self, *, limit: int | None = None, subject: str | None = None) -> tuple[audit.AuditEntry, ...]:
        """Return entries of the audit log, newest first; see :func:`kedge.fleet.audit.entries`."""
        with self.database.read() as session:
            return audit.entries(session, limit=limit, subject=subject)

    def audit_verify(self, *, expect: str | None = None) -> str:
        """Check the audit log and return its head; see :func:`kedge.fleet.audit.verify`.

        Raises:
            FleetError: it was changed or cut.
        """
        with self.database.read() as session:
            return audit.verify(session, expect=expect)
