"""Makes the plan of a staged rollout: to be looked at, or to be started."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from kedge.fleet import candidates, releases, rollouts
from kedge.fleet.database import Row, Session
from kedge.fleet.results import PlannedWave, RolloutPlan
from kedge.fleet.rollouts import START, Plan, Selection
from kedge.fleet.staged import choice, gates, records
from kedge.fleet.staged.phases import Phase
from kedge.fleet.staged.policy import Busy, Policy
from kedge.fleet.staged.states import Member, State
from kedge.fleet.staged.waves import WavePlan
from kedge.fleet.storage import Repository
from kedge_protocol import blocks

_IN_THE_WAY = """
SELECT DISTINCT rollout_stage.rollout_id, model FROM rollout_stage
JOIN rollout ON rollout.id = rollout_stage.rollout_id
JOIN rollout_member AS one ON one.rollout_id = rollout_stage.rollout_id
WHERE live = 2 AND step NOT IN ('gone', 'reverted') AND device_id IN {}
"""
_HELD = "SELECT device_id, desired, digest, previous FROM reported_model WHERE device_id IN {}"
_BLOBS = """
SELECT DISTINCT bundle.digest AS bundle, blob.digest, blob.size FROM bundle
JOIN bundle_blob ON bundle_id = bundle.id JOIN blob ON blob.digest = bundle_blob.digest WHERE bundle.digest IN {}
"""


def selecting(policy: Policy, labels: Mapping[str, str]) -> Policy:
    """Return the checked policy that selects only devices with these labels."""
    return replace(policy, select=choice.with_labels(policy.select, labels)).check()


def start(
    session: Session, release: Row, policy: Policy, labels: Mapping[str, str], *, now: float
) -> tuple[int, dict[str, str]]:
    """Write a new staged rollout; the engine carries it on.

    Returns:
        Its number, and the selected devices that it cannot reach (device → reason).

    Raises:
        FleetError: it selects no device, or there is no bundle for any of them.
    """
    selection, found, numbers = _planned(session, release, policy)
    members = {
        numbers[name]: Member(target=target, wave=wave)
        for wave, devices in enumerate(found.waves, 1)
        for name, target in devices.items()
    }
    number = rollouts.create(
        session,
        Plan(
            model=release["name"],
            version=release["version"],
            kind=START,
            selected=json.dumps(dict(labels)),
            parts={},
        ),
    )
    state = State(waves=len(found.waves), since=now, members=members)
    if policy.busy is Busy.SUPERSEDE:
        # At once, so that an older rollout tells none of these devices any more.
        state = replace(state, phase=Phase.SCHEDULED)
    records.create(session, number, policy, state)
    if state.phase is Phase.SCHEDULED:
        rollouts.claim(session, number, release["name"], table="rollout_member")
    return number, dict(selection.skipped)


def plan(session: Session, repository: Repository, reference: str, policy: Policy) -> RolloutPlan:
    """Return what a rollout would do.

    Raises:
        FleetError: as of :func:`start`, or there is no such release.
    """
    release = releases.find(session, reference)
    selection, found, numbers = _planned(session, release, policy)
    order = {numbers[name]: target for wave in found.waves for name, target in wave.items()}
    moved = _Transfers(session, repository, candidates.expected(session, release, order))
    waves = []
    for number, wave in enumerate(found.waves, 1):
        by_target: dict[str, list[str]] = {}
        for name, target in wave.items():
            by_target.setdefault(target, []).append(name)
        count = sum(moved.bytes_to(numbers[name]) for name in wave)
        waves.append(PlannedWave(number=number, devices=dict(sorted(by_target.items())), bytes=count))
    busy = session.where_in(_IN_THE_WAY, list(selection.targets))
    return RolloutPlan(
        release=reference,
        devices=len(selection.targets),
        bytes=sum(wave.bytes for wave in waves),
        waves=tuple(waves),
        shortfalls=found.shortfalls,
        powerless=_powerless(policy, waves),
        skipped=dict(selection.skipped),
        in_the_way=tuple(sorted({row["rollout_id"] for row in busy if row["model"] == release["name"]})),
        policy=policy,
    )


def _powerless(policy: Policy, waves: Sequence[PlannedWave]) -> dict[int, dict[str, tuple[str, ...]]]:
    sizes = dict.fromkeys((target for wave in waves for target in wave.devices), 0)
    found = {}
    for wave in waves:
        for target, names in wave.devices.items():
            sizes[target] += len(names)
        if targets := gates.powerless(policy.gates, sizes):
            found[wave.number] = targets
    return found


def _planned(session: Session, release: Row, policy: Policy) -> tuple[Selection, WavePlan, dict[str, int]]:
    rows = choice.choose(session, policy)
    selection = rollouts.select(session, release, rows)
    names = {row["id"]: row["name"] for row in rows}
    found = choice.plan(policy, selection, names)
    return selection, found, {name: number for number, name in names.items()}


class _Transfers:
    """What must move to devices, reckoned as their agents do: a blob of one block as a whole; of a larger one its block
    map, and each block once that is not all zeros and in no larger blob that they hold."""

    def __init__(self, session: Session, repository: Repository, wanted: Mapping[int, tuple[str, ...]]) -> None:
        self._session = session
        self._repository = repository
        self._wanted = wanted
        self._held: dict[int, set[str]] = {}
        for row in session.where_in(_HELD, list(wanted)):
            self._held.setdefault(row["device_id"], set()).update(filter(None, tuple(row)[1:]))
        self._blobs: dict[str, dict[str, int]] = {}
        digests = {one for some in (*wanted.values(), *self._held.values()) for one in some}
        for row in session.where_in(_BLOBS, sorted(digests)):
            self._blobs.setdefault(row["bundle"], {})[row["digest"]] = row["size"]
        self._blocks: dict[str, dict[bytes, int]] = {}
        self._known: dict[tuple[str, frozenset[str]], int] = {}

    def bytes_to(self, number: int) -> int:
        """Return the payload bytes that must move to a device."""
        held, count = frozenset(self._held.get(number, ())), 0
        for wanted in self._wanted[number]:
            key = wanted, held
            if key not in self._known:
                self._known[key] = 0 if wanted in held else self._count(wanted, held)
            count += self._known[key]
            held |= {wanted}
        return count

    def _count(self, wanted: str, held: Iterable[str]) -> int:
        there = {blob: size for bundle in held for blob, size in self._blobs.get(bundle, {}).items()}
        have = {one for blob, size in there.items() if size > blocks.BLOCK_SIZE for one in self._blocks_of(blob, size)}
        missing = {blob: size for blob, size in self._blobs.get(wanted, {}).items() if blob not in there}
        return sum(self._moved(blob, size, have) for blob, size in missing.items())

    def _moved(self, blob: str, size: int, have: Collection[bytes]) -> int:
        if size <= blocks.BLOCK_SIZE:
            return size
        of_map = blocks.block_count(size) * blocks.HASH_SIZE
        return of_map + sum(length for one, length in self._blocks_of(blob, size).items() if one not in have)

    def _blocks_of(self, blob: str, size: int) -> dict[bytes, int]:
        """Return the blocks of a blob that are not all zeros: hash → bytes."""
        if blob not in self._blocks:
            path, count, width = self._repository.map_path(blob), blocks.block_count(size), blocks.HASH_SIZE
            raw = path.read_bytes() if path.is_file() else b""
            hashes = [raw[place : place + width] for place in range(0, len(raw), width)]
            if len(hashes) != count:
                hashes = [f"{blob} {index}".encode() for index in range(count)]
            found = {one: blocks.block_length(size, index) for index, one in enumerate(hashes)}
            zeros = {blocks.block_hash(bytes(length)) for length in set(found.values())}
            self._blocks[blob] = {one: length for one, length in found.items() if one not in zeros}
        return self._blocks[blob]
