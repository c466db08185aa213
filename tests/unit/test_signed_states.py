"""A device takes only what its fleet's keys signed for it; everything else is refused, and the report says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle
from tests.support.update_world import World, make_release

from kedge.fleet import releases, shadows
from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.keys import Keys
from kedge.fleet.kit import KitOptions, members
from kedge.fleet.service import FleetService
from kedge_agent import config
from kedge_agent.update import events
from kedge_agent.update.desired_states import DesiredStates, Identity
from kedge_protocol import codec
from kedge_protocol.errors import FleetError, KedgeError
from kedge_protocol.messages import Desired, DesiredRefusal, decode_desired
from kedge_protocol.signatures import parse_envelope, sign
from kedge_protocol.trust import DESIRED_TYPE, RELEASE_TYPE, Role, Trust


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    targets = ["rpi4", "generic-cpu"]
    return {
        "1.0": make_bundle(folder, version="1.0", target=targets),
        "2.0": make_bundle(folder, version="2.0", target=targets, head_seed=1),
    }


@pytest.fixture
def fleet(tmp_path: Path, layouts: dict[str, Path]) -> FleetService:
    return made(tmp_path / "state", layouts)


def made(state: Path, layouts: dict[str, Path]) -> FleetService:
    fleet = FleetService(state)
    for layout in layouts.values():
        fleet.publish(layout)
    for name, target in (("pi", "rpi4"), ("other", "rpi4"), ("pc", "generic-cpu")):
        fleet.device_add(name, target)
    fleet.rollout_start("tiny:1.0")
    return fleet


def published(fleet: FleetService, device: str = "pi") -> bytes:
    (found,) = ControllerStore(fleet.database).publications([device])
    return found.payload


def device(fleet: FleetService, *, name: str = "pi", target: str = "rpi4") -> DesiredStates:
    return DesiredStates("", Identity(device=name, target=target, trust=Keys(fleet.state).trust()))


def resigned(fleet: FleetService, raw: bytes, **changes: object) -> bytes:
    """A state that the fleet's own controller key signed, with other content."""
    desired = replace(decode_desired(raw, where="test"), **changes)  # type: ignore[arg-type]
    return codec.encode(sign(DESIRED_TYPE, codec.encode(desired), Keys(fleet.state).private(Role.CONTROLLER)))


def refused(states: DesiredStates, raw: bytes) -> DesiredRefusal:
    before = states.current
    assert not states.take(raw)
    assert states.current == before
    assert states.refused is not None
    assert states.problem == states.refused.detail
    return states.refused.reason


def test_what_the_fleet_publishes_is_taken(fleet: FleetService) -> None:
    for name, target in (("pi", "rpi4"), ("pc", "generic-cpu")):
        states = device(fleet, name=name, target=target)
        assert states.take(published(fleet, name)), states.problem
        assert states.version == 1


def test_a_device_without_keys_takes_signed_and_unsigned_states(fleet: FleetService) -> None:
    signed = published(fleet)
    assert DesiredStates("").take(signed)
    assert DesiredStates("").take(codec.encode(decode_desired(signed, where="test")))


def test_an_unsigned_state_is_refused(fleet: FleetService) -> None:
    bare = codec.encode(decode_desired(published(fleet), where="test"))
    assert refused(device(fleet), bare) is DesiredRefusal.UNSIGNED


def test_a_replayed_older_state_is_refused_and_the_same_one_is_not_news(fleet: FleetService) -> None:
    first, states = published(fleet), device(fleet)
    assert states.take(first)
    fleet.rollout_start("tiny:2.0")
    second = published(fleet)
    assert states.take(second)
    assert refused(states, first) is DesiredRefusal.OLDER
    assert states.news
    assert not states.take(second)
    assert not states.news


def test_another_devices_state_is_refused(fleet: FleetService) -> None:
    assert refused(device(fleet), published(fleet, "other")) is DesiredRefusal.DEVICE


def test_another_targets_bundle_is_refused_even_from_the_controller(fleet: FleetService) -> None:
    pc = decode_desired(published(fleet, "pc"), where="test")
    raw = resigned(fleet, published(fleet), models=pc.models, sizes=pc.sizes, releases=pc.releases)
    states = device(fleet)
    assert refused(states, raw) is DesiredRefusal.RELEASE
    assert states.problem == "tiny: it is a bundle for generic-cpu, this device is rpi4"


def test_a_bundle_under_another_models_name_is_refused(fleet: FleetService) -> None:
    raw = published(fleet)
    (digest,) = decode_desired(raw, where="test").models.values()
    assert refused(device(fleet), resigned(fleet, raw, models={"other": digest})) is DesiredRefusal.RELEASE


def test_a_bundle_without_its_signed_release_is_refused(fleet: FleetService) -> None:
    assert refused(device(fleet), resigned(fleet, published(fleet), releases=())) is DesiredRefusal.RELEASE


def test_a_shadow_needs_its_signed_release_for_this_target_too(fleet: FleetService) -> None:
    assert shadows.start(fleet, "tiny:2.0", {}) == ("other", "pc", "pi")
    raw = published(fleet)
    desired = decode_desired(raw, where="test")
    assert len(desired.releases) == 2
    assert device(fleet).take(raw)
    assert refused(device(fleet), resigned(fleet, raw, releases=desired.releases[:1])) is DesiredRefusal.RELEASE
    foreign = decode_desired(published(fleet, "pc"), where="test").shadows
    assert refused(device(fleet), resigned(fleet, raw, shadows=foreign)) is DesiredRefusal.RELEASE
    with pytest.raises(FleetError, match="cannot be removed"):
        fleet.release_remove("tiny:2.0")
    # Once a device is to serve it, it is the shadow of nothing.
    fleet.rollout_start("tiny:2.0")
    assert decode_desired(published(fleet), where="test").shadows == {}


def test_the_soak_of_a_rollout_reaches_the_device(fleet: FleetService) -> None:
    with fleet.database.write() as session:
        session.run("UPDATE desired_model SET soak = 90")
    assert decode_desired(published(fleet), where="test").soaks == {"tiny": 90.0}


def test_a_release_that_the_controllers_key_signed_is_refused(fleet: FleetService) -> None:
    raw = published(fleet)
    (statement,) = decode_desired(raw, where="test").releases
    own = sign(RELEASE_TYPE, statement.content(where="test"), Keys(fleet.state).private(Role.CONTROLLER))
    assert refused(device(fleet), resigned(fleet, raw, releases=(own,))) is DesiredRefusal.RELEASE


def test_another_fleets_state_is_refused(fleet: FleetService, tmp_path: Path, layouts: dict[str, Path]) -> None:
    foreign = made(tmp_path / "foreign", layouts)
    assert refused(device(fleet), published(foreign)) is DesiredRefusal.SIGNATURE


def test_a_release_statement_in_the_place_of_a_desired_state_is_refused(fleet: FleetService) -> None:
    desired = codec.encode(decode_desired(published(fleet), where="test"))
    raw = codec.encode(sign(RELEASE_TYPE, desired, Keys(fleet.state).private(Role.CONTROLLER)))
    assert refused(device(fleet), raw) is DesiredRefusal.SIGNATURE


@pytest.mark.parametrize("at", range(3, 200, 23))
def test_a_state_with_a_changed_byte_is_refused(fleet: FleetService, at: int) -> None:
    document = json.loads(published(fleet))
    payload = parse_envelope(published(fleet), where="test").content(where="test")
    changed = bytearray(payload)
    changed[at] ^= 1
    import base64

    document["payload"] = base64.b64encode(changed).decode()
    states = device(fleet)
    assert not states.take(json.dumps(document).encode())
    assert states.problem
    assert states.version == 0


def test_devices_follow_the_rotation_of_either_key_and_trust_the_old_one_no_longer(fleet: FleetService) -> None:
    states, first = device(fleet), published(fleet)
    assert states.take(first)
    for role in (Role.CONTROLLER, Role.RELEASE, Role.CONTROLLER):
        before = resigned(fleet, first, version=99)
        fleet.key_rotate(role)
        assert states.take(published(fleet)), states.problem
        assert states.trust == Keys(fleet.state).trust()
        if role is Role.CONTROLLER:
            assert refused(states, before) is DesiredRefusal.SIGNATURE
    late = DesiredStates("", Identity(device="pi", target="rpi4", trust=device_trust(fleet, first)))
    assert late.take(published(fleet)), "a device that slept through all of it follows too"


def device_trust(fleet: FleetService, first: bytes) -> Trust:
    """The keys of the beginning: those whose rotation number is 0."""
    files = sorted((fleet.state / "keys").glob("*.pem"), key=lambda path: path.stat().st_mtime_ns)
    from cryptography.hazmat.primitives import serialization

    from kedge_protocol.signatures import public_of

    oldest = {}
    for path in files:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
        oldest.setdefault(path.name.partition("-")[0], str(public_of(key)))  # type: ignore[arg-type]
    return Trust(release=(oldest["release"],), controller=(oldest["controller"],))


def test_a_rotation_survives_a_restart_and_a_new_kit_replaces_it(fleet: FleetService, tmp_path: Path) -> None:
    pinned = Keys(fleet.state).trust()
    world = World(tmp_path / "device", trust=pinned)
    world.connect()
    fleet.key_rotate(Role.CONTROLLER)
    nothing = Desired(version=5, models={}, sizes={}, device="dev", rotations=Keys(fleet.state).rotations())
    key = Keys(fleet.state).private(Role.CONTROLLER)
    world.post(events.DesiredArrived(codec.encode(sign(DESIRED_TYPE, codec.encode(nothing), key))))
    world.settle()
    assert world.machine.desired_version == 5
    world.crash()
    assert world.machine.desired_states.trust == Keys(fleet.state).trust() != pinned
    world.trust = replace(pinned, release=pinned.controller)
    world.crash()
    assert world.machine.desired_states.trust == world.trust


def test_the_report_tells_the_refusal_of_an_unsigned_state(fleet: FleetService, tmp_path: Path) -> None:
    world = World(tmp_path / "device", trust=Keys(fleet.state).trust())
    release = world.controller.add(make_release({"model.bin": b"weights"}))
    world.connect()
    reports = world.reports
    world.desire(1, release)
    world.settle()
    assert world.machine.desired_version == 0
    assert world.reports > reports
    told = world.machine.desired_states.refused
    assert told is not None
    assert (told.reason, told.version) == (DesiredRefusal.UNSIGNED, 1)


def test_a_kit_pins_the_keys_and_its_agent_reads_them(fleet: FleetService, tmp_path: Path) -> None:
    trust = Keys(fleet.state).trust()
    for path, member in members("pi", "rpi4", KitOptions(broker="mqtt://localhost"), trust).items():
        if path.startswith("etc/kedge/"):
            (tmp_path / Path(path).name).write_bytes(member.content)
    assert config.read(tmp_path / "agent.toml").trust == trust
    (tmp_path / "trust.json").write_text('{"release": [], "controller": []}')
    with pytest.raises(KedgeError, match="no release key is trusted"):
        config.read(tmp_path / "agent.toml")
    (tmp_path / "trust.json").unlink()
    with pytest.raises(KedgeError, match="kit again"):
        config.read(tmp_path / "agent.toml")


def test_a_release_key_in_offline_storage_is_given_to_the_commands_that_need_it(
    tmp_path: Path, layouts: dict[str, Path]
) -> None:
    fleet = FleetService(tmp_path / "state")
    (release, controller) = fleet.keys()
    assert release.file is not None
    assert controller.file is not None
    assert all(one.file is not None and one.file.stat().st_mode & 0o777 == 0o600 for one in (release, controller))
    offline = release.file.rename(tmp_path / "offline.pem")
    assert fleet.keys()[0].file is None
    with pytest.raises(FleetError, match="--release-key"):
        fleet.publish(layouts["1.0"])
    assert not fleet.releases()
    with pytest.raises(FleetError, match="do not trust this release key"):
        fleet.publish(layouts["1.0"], release_key=controller.file)
    fleet.publish(layouts["1.0"], release_key=offline)
    with fleet.database.read() as session:
        statements = releases.statements(session)
    for wrong, words in ((controller.file, "do not trust this release key"), (tmp_path / "no.pem", "is not there")):
        with pytest.raises(FleetError, match=words):
            fleet.publish(layouts["1.0"], release_key=wrong)
    assert not fleet.publish(layouts["1.0"], release_key=offline).new
    with fleet.database.read() as session:
        assert releases.statements(session) == statements
    fleet.publish(layouts["1.0"])  # it is signed already
    with pytest.raises(FleetError, match="--release-key"):
        fleet.key_rotate(Role.CONTROLLER)
    fleet.key_rotate(Role.CONTROLLER, release_key=offline)
    assert [entry.action for entry in fleet.audit_log()][:2] == ["key.rotate", "release.publish"]
