"""A fleet's state folder before the rollout: devices added, both releases published, the old one wanted."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kedge.fleet import devices as fleet_devices
from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.keys import Keys
from kedge.fleet.service import FleetService
from kedge.simulator import releases
from kedge.simulator.scenario import MODEL, Scenario
from kedge.simulator.traits import Traits
from kedge_protocol.blocks import map_of_file
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.trust import Trust

ACTOR = "simulator"
_AT_ONCE = 500


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What the devices are given.

    Attributes:
        trust: the keys of their kits.
        old: target → bundle.
        new: all bundles of the new release.
        desired: device → the signed desired state that it took before the simulation began.
        maps: blob of the old release → its block map.
    """

    trust: Trust
    old: dict[str, Bundle]
    new: tuple[Bundle, ...]
    desired: dict[str, str]
    maps: dict[str, bytes]


def prepare(scenario: Scenario, devices: Iterable[Traits], state: Path, clock: Callable[[], float]) -> Prepared:
    """Fill an empty state folder.

    Raises:
        TargetError: there is no such target.
        StorageError: no space.
    """
    with (
        FleetService(state, actor=ACTOR, clock=clock) as fleet,
        tempfile.TemporaryDirectory(dir=state) as scratch,
    ):
        _add(fleet, devices)
        layouts = [Layout(folder) for folder in releases.write(scenario, Path(scratch))]
        for layout in layouts:
            fleet.publish(layout.path)
        fleet.rollout_start(f"{MODEL}:{scenario.old.version}")
        old = {target: layouts[0].bundle(target) for target in scenario.targets}
        new = tuple(bundle for target in scenario.targets for bundle in layouts[1].candidates(target))
        layers = {layer.digest for bundle in old.values() for layer in bundle.manifest.layers}
        maps = {layer: map_of_file(fleet.repository.blob_path(layer)) for layer in layers}
        return Prepared(trust=Keys(state).trust(), old=old, new=new, desired=_desired(fleet), maps=maps)


def _add(fleet: FleetService, devices: Iterable[Traits]) -> None:
    """Add the devices; one of each target is checked, since reading a target's file takes longer than the rest."""
    targets: dict[str, str] = {}
    with fleet.database.write() as session:
        for one in devices:
            if one.target not in targets:
                targets[one.target] = fleet_devices.check_new(session, one.name, one.target, one.labels)
            fleet_devices.insert(session, one.name, targets[one.target], one.labels)


def _desired(fleet: FleetService) -> dict[str, str]:
    store = ControllerStore(fleet.database)
    names = [one.name for one in fleet.device_list().devices]
    found = {}
    for start in range(0, len(names), _AT_ONCE):
        for one in store.publications(names[start : start + _AT_ONCE]):
            found[one.device] = one.payload.decode()
    return found
