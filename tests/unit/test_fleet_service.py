"""The verbs of the fleet, on a real database."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle

from kedge.fleet.controller_store import ControllerStore
from kedge.fleet.database import state_folder
from kedge.fleet.results import Progress
from kedge.fleet.rollout_status import DeviceFilter
from kedge.fleet.service import FleetService
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import ConfigError, FleetError, StorageError, TargetError
from kedge_protocol.messages import Desired, decode_desired


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("layouts")
    both = ["rpi4", "generic-cpu"]
    return {
        "1.0": make_bundle(folder, version="1.0", target=both),
        "2.0": make_bundle(folder, version="2.0", target=both, head_seed=1),
        "other": make_bundle(folder, name="other", target="rpi4", seed=3),
        "1.0 again": make_bundle(folder / "again", version="1.0", target=both, seed=9),
    }


@pytest.fixture
def fleet(tmp_path: Path, layouts: dict[str, Path]) -> FleetService:
    made = FleetService(tmp_path / "state")
    for key in ("1.0", "2.0", "other"):
        made.publish(layouts[key])
    return made


def publications(fleet: FleetService) -> dict[str, Desired | None]:
    records = ControllerStore(fleet.database)
    found = records.publications(list(records.snapshot().versions))
    return {
        publication.device: decode_desired(publication.payload, where="wish") if publication.payload else None
        for publication in found
    }


def bundle(layouts: dict[str, Path], key: str, target: str = "rpi4") -> str:
    return Layout(layouts[key]).bundle(target).digest


def test_devices_are_added_selected_shown_and_removed(fleet: FleetService) -> None:
    fleet.device_add("b", "rpi4", {"site": "berlin", "floor": "1"})
    fleet.device_add("a", "generic-cpu", {"site": "berlin"})
    fleet.device_add("c", "rpi4", {"site": "paris"})
    assert [one.name for one in fleet.devices()] == ["a", "b", "c"]
    assert [one.name for one in fleet.devices({"site": "berlin"})] == ["a", "b"]
    assert [one.name for one in fleet.devices({"site": "berlin", "floor": "1"})] == ["b"]
    assert fleet.device("b").device.labels == {"site": "berlin", "floor": "1"}
    fleet.device_remove("b")
    assert [one.name for one in fleet.devices()] == ["a", "c"]
    with pytest.raises(FleetError, match=r"no device 'b'.*Known are: a, c"):
        fleet.device("b")


def test_what_cannot_be_a_device_is_refused(fleet: FleetService, tmp_path: Path) -> None:
    fleet.device_add("a", "rpi4")
    with pytest.raises(FleetError, match="already"):
        fleet.device_add("a", "rpi4")
    for name in ("", "a/b", "+", "#", "..", "x" * 65):
        with pytest.raises(ConfigError, match="device name"):
            fleet.device_add(name, "rpi4")
    with pytest.raises(TargetError, match="unknown target 'none'"):
        fleet.device_add("d", "none")
    with pytest.raises(ConfigError, match="label"):
        fleet.device_add("d", "rpi4", {"site": "b erlin"})
    board = tmp_path / "board.toml"
    text = (Path(__file__).parents[2] / "targets/kedge_targets/devices/rpi4.toml").read_text(encoding="utf-8")
    board.write_text(text.replace('name = "rpi4"', 'name = "my-board"'), encoding="utf-8")
    assert fleet.device_add("d", str(board)).target == "my-board"


def test_publishing_twice_is_nothing_new_and_another_of_the_same_name_is_a_conflict(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    before = fleet.releases()
    again = fleet.publish(layouts["1.0"])
    assert (again.new, again.blobs_added) == (False, 0)
    with pytest.raises(FleetError, match=r"tiny:1\.0 was published already"):
        fleet.publish(layouts["1.0 again"])
    assert fleet.releases() == before
    assert [f"{one.name}:{one.version}" for one in before] == ["tiny:1.0", "tiny:2.0", "other:1.0"]


def test_each_device_is_to_have_the_bundle_of_its_target(fleet: FleetService, layouts: dict[str, Path]) -> None:
    fleet.device_add("a", "rpi4", {"site": "x"})
    fleet.device_add("b", "generic-cpu", {"site": "x"})
    fleet.device_add("c", "rpi4")
    started = fleet.rollout_start("tiny:1.0", {"site": "x"})
    assert started.skipped == {}
    assert [one.device for one in started.rollout.devices] == ["a", "b"]
    found = publications(fleet)
    assert set(found) == {"a", "b", "c"}
    assert found["c"] is None
    for name, target in (("a", "rpi4"), ("b", "generic-cpu")):
        wanted = found[name]
        assert wanted is not None
        raw = Layout(layouts["1.0"]).bundle(target).raw
        assert wanted.models == {"tiny": bundle(layouts, "1.0", target)}
        assert wanted.sizes == {bundle(layouts, "1.0", target): len(raw)}


def test_a_device_without_a_bundle_is_left_out_and_named(fleet: FleetService) -> None:
    fleet.device_add("a", "rpi4")
    fleet.device_add("b", "generic-cpu")
    started = fleet.rollout_start("other:1.0")
    assert [one.device for one in started.rollout.devices] == ["a"]
    assert list(started.skipped) == ["b"]
    assert "generic-cpu" in started.skipped["b"]
    fleet.device_remove("a")
    with pytest.raises(FleetError, match="no bundle for any selected device"):
        fleet.rollout_start("other:1.0")


def test_what_cannot_be_rolled_out_is_refused(fleet: FleetService) -> None:
    with pytest.raises(FleetError, match="no device"):
        fleet.rollout_start("tiny:1.0")
    fleet.device_add("a", "rpi4")
    with pytest.raises(FleetError, match=r"site=nowhere"):
        fleet.rollout_start("tiny:1.0", {"site": "nowhere"})
    with pytest.raises(FleetError, match=r"no release tiny:9.*tiny:1\.0"):
        fleet.rollout_start("tiny:9")
    with pytest.raises(FleetError, match="NAME:VERSION"):
        fleet.rollout_start("tiny")
    with pytest.raises(FleetError, match="no rollout"):
        fleet.rollout_status()
    with pytest.raises(FleetError, match="no rollout"):
        fleet.rollout_revert()


def test_a_newer_rollout_of_a_model_supersedes_the_older_and_leaves_other_models_alone(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    fleet.device_add("a", "rpi4", {"site": "x"})
    fleet.device_add("b", "rpi4")
    first = fleet.rollout_start("tiny:1.0").rollout
    other = fleet.rollout_start("other:1.0").rollout
    second = fleet.rollout_start("tiny:2.0", {"site": "x"}).rollout
    # What the newer one does not touch still stands.
    assert fleet.rollout_status(first.id).state == "active"
    assert fleet.rollout_status(other.id).state == "active"
    assert [one.progress for one in fleet.rollout_status(first.id).devices] == [Progress.SUPERSEDED, Progress.OFFLINE]
    assert fleet.device("a").device.desired == {
        "tiny": bundle(layouts, "2.0"),
        "other": bundle(layouts, "other"),
    }
    assert fleet.device("b").device.desired["tiny"] == bundle(layouts, "1.0")
    assert second.devices[0].previous == bundle(layouts, "1.0")
    fleet.rollout_start("tiny:2.0")
    assert fleet.rollout_status(first.id).state == "superseded"
    with pytest.raises(FleetError, match="superseded on all its devices"):
        fleet.rollout_revert(first.id)


def test_rollouts_by_label_own_their_devices_and_revert_takes_back_only_those(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    one, two = bundle(layouts, "1.0"), bundle(layouts, "2.0")
    fleet.device_add("a", "rpi4", {"site": "x"})
    fleet.device_add("b", "rpi4", {"site": "y"})
    both = fleet.rollout_start("tiny:1.0").rollout
    only_a = fleet.rollout_start("tiny:2.0", {"site": "x"}).rollout
    only_b = fleet.rollout_start("tiny:2.0", {"site": "y"}).rollout
    # The two of 2.0 have no device in common: neither ends the other.
    assert [fleet.rollout_status(one.id).state for one in (both, only_a, only_b)] == ["superseded", "active", "active"]
    assert not fleet.rollout_status(both.id).done
    fleet.rollout_revert(only_a.id)
    assert {one.name: one.desired["tiny"] for one in fleet.devices()} == {"a": one, "b": two}
    # What was reverted owns nothing any more; the other still does.
    with pytest.raises(FleetError, match=r"superseded on all its devices.*rollout 4"):
        fleet.rollout_revert(only_a.id)
    fleet.rollout_revert(only_b.id)
    assert {one.desired["tiny"] for one in fleet.devices()} == {one}


def test_revert_leaves_the_devices_alone_that_a_newer_rollout_took_over(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    fleet.device_add("a", "rpi4", {"site": "x"})
    fleet.device_add("b", "rpi4")
    first = fleet.rollout_start("tiny:1.0").rollout
    fleet.rollout_start("tiny:2.0", {"site": "x"})
    back = fleet.rollout_revert(first.id)
    assert [one.device for one in back.devices] == ["b"]
    assert {one.name: one.desired.get("tiny") for one in fleet.devices()} == {"a": bundle(layouts, "2.0"), "b": None}


def test_rollouts_are_counted_filtered_and_paged(fleet: FleetService) -> None:
    for number in range(7):
        fleet.device_add(f"d{number}", "rpi4", {"half": str(number % 2)})
    started = fleet.rollout_start("tiny:1.0").rollout
    fleet.rollout_start("tiny:2.0", {"half": "1"})
    whole = fleet.rollout_status(started.id)
    assert whole.counts == {"offline": 4, "superseded": 3}
    assert (whole.matching, len(whole.devices)) == (7, 7)
    page = fleet.rollout_status(
        started.id, shown=DeviceFilter(progress=frozenset({Progress.OFFLINE}), select={"half": "0"}, limit=2, offset=1)
    )
    assert page.counts == whole.counts
    assert page.matching == 4
    assert [one.device for one in page.devices] == ["d2", "d4"]
    assert [one.id for one in fleet.rollouts()] == [2, 1]
    assert [one.counts for one in fleet.rollouts(limit=1)] == [{"offline": 3}]
    for number in (0, -1, 3, 99999999999999999999):
        with pytest.raises(FleetError, match=f"no rollout {number}"):
            fleet.rollout_status(number)
    listed = fleet.device_list({"half": "0"}, limit=2, offset=2)
    assert (listed.total, listed.online, [one.name for one in listed.devices]) == (4, 0, ["d4", "d6"])


def test_labels_are_edited_and_what_shall_run_stays(fleet: FleetService) -> None:
    fleet.device_add("a", "rpi4", {"site": "x", "floor": "1"})
    fleet.rollout_start("tiny:1.0", {"site": "x"})
    edited = fleet.device_edit("a", {"site": "y", "rack": "3"}, ["floor"])
    assert edited.labels == {"site": "y", "rack": "3"}
    assert fleet.device("a").device.desired == edited.desired != {}
    with pytest.raises(FleetError, match="site=x"):
        fleet.rollout_start("tiny:1.0", {"site": "x"})
    with pytest.raises(ConfigError, match=r"no label 'floor'.*rack, site"):
        fleet.device_edit("a", {}, ["floor"])
    with pytest.raises(ConfigError, match="to be set and to be removed"):
        fleet.device_edit("a", {"site": "z"}, ["site"])
    with pytest.raises(ConfigError, match="label"):
        fleet.device_edit("a", {"site": "b erlin"})
    with pytest.raises(FleetError, match="no device 'b'"):
        fleet.device_edit("b", {"site": "z"})
    assert fleet.device("a").device.labels == edited.labels


def blobs_of(fleet: FleetService) -> set[str]:
    folders = (fleet.state / "blobs" / "sha256", fleet.state / "maps")
    return {f"sha256:{path.name}" for folder in folders if folder.is_dir() for path in folder.iterdir()}


def test_a_removed_release_takes_the_blobs_that_nothing_else_needs(
    fleet: FleetService, layouts: dict[str, Path]
) -> None:
    whole = blobs_of(fleet)
    stray = fleet.state / "blobs" / "sha256" / ("f" * 64)
    stray.write_bytes(b"of a publication that was broken off")
    shared = {one.digest for one in Layout(layouts["1.0"]).bundle("rpi4").manifest.layers}
    shared &= {one.digest for one in Layout(layouts["2.0"]).bundle("rpi4").manifest.layers}
    done = fleet.release_remove("tiny:1.0")
    assert done.release.version == "1.0"
    assert not stray.exists()
    assert [f"{one.name}:{one.version}" for one in fleet.releases()] == ["tiny:2.0", "other:1.0"]
    left = blobs_of(fleet)
    assert bundle(layouts, "1.0") not in left
    assert {bundle(layouts, "2.0"), bundle(layouts, "other")} | shared <= left
    assert done.bytes_removed > 0
    with pytest.raises(FleetError, match=r"no release tiny:1\.0"):
        fleet.release_remove("tiny:1.0")
    # What was removed may be published again, whole.
    assert fleet.publish(layouts["1.0"]).new
    assert blobs_of(fleet) == whole


def test_a_release_that_a_device_shall_run_stays_and_one_that_revert_needs_is_named(fleet: FleetService) -> None:
    fleet.device_add("a", "rpi4")
    fleet.rollout_start("tiny:1.0")
    with pytest.raises(FleetError, match=r"1 device shall run it \(a\)"):
        fleet.release_remove("tiny:1.0")
    fleet.rollout_start("tiny:2.0")
    fleet.release_remove("tiny:1.0")
    with pytest.raises(FleetError, match="was removed, it cannot be brought back"):
        fleet.rollout_revert()
    assert fleet.device("a").device.desired


def test_revert_brings_back_what_each_device_had(fleet: FleetService, layouts: dict[str, Path]) -> None:
    fleet.device_add("a", "rpi4", {"site": "x"})
    fleet.device_add("b", "rpi4")
    fleet.rollout_start("tiny:1.0", {"site": "x"})
    fleet.rollout_start("tiny:2.0")
    versions = {one.name: one.desired_version for one in fleet.devices()}
    back = fleet.rollout_revert()
    assert (back.kind, back.version) == ("revert", "1.0")
    assert fleet.device("a").device.desired == {"tiny": bundle(layouts, "1.0")}
    assert fleet.device("b").device.desired == {}
    assert all(one.desired_version > versions[one.name] for one in fleet.devices())
    wanted = publications(fleet)["b"]
    assert wanted is not None
    assert wanted.models == {}
    fleet.rollout_revert()
    assert {one.desired["tiny"] for one in fleet.devices()} == {bundle(layouts, "2.0")}


def test_a_device_added_again_goes_on_above_its_old_version(fleet: FleetService) -> None:
    fleet.device_add("a", "rpi4")
    for version in ("1.0", "2.0"):
        fleet.rollout_start(f"tiny:{version}")
    before = fleet.device("a").device.desired_version
    fleet.device_remove("a")
    assert publications(fleet) == {"a": None}
    fleet.device_add("a", "generic-cpu")
    # Nothing is wanted of it until a rollout: what it has it keeps, and what the broker may retain is cleared.
    assert publications(fleet) == {"a": None}
    fleet.rollout_start("tiny:1.0")
    assert fleet.device("a").device.desired_version > before


def test_the_controller_is_woken_by_every_verb_that_concerns_it(fleet: FleetService, layouts: dict[str, Path]) -> None:
    seen = fleet.database.changes()

    def woken() -> bool:
        nonlocal seen
        before, seen = seen, fleet.database.changes()
        return seen > before

    fleet.device_add("a", "rpi4")
    assert woken()
    fleet.rollout_start("tiny:1.0")
    assert woken()
    fleet.rollout_revert()
    assert woken()
    fleet.publish(layouts["1.0"])
    fleet.devices()
    fleet.rollout_status()
    assert not woken()
    fleet.device_remove("a")
    assert woken()


def test_several_processes_write_at_once_without_loss(tmp_path: Path) -> None:
    state = tmp_path / "state"
    program = (
        "import sys; from pathlib import Path; from kedge.fleet.service import FleetService\n"
        "fleet = FleetService(Path(sys.argv[1]))\n"
        "for number in range(15): fleet.device_add(f'{sys.argv[2]}-{number}', 'rpi4')\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(state), name], stderr=subprocess.PIPE) for name in "abc"
    ]
    for child in children:
        _, errors = child.communicate(timeout=300)
        assert child.returncode == 0, errors.decode()
    with FleetService(state) as fleet:
        assert len(fleet.devices()) == 45
        assert fleet.database.changes() == 45


def test_several_processes_may_make_the_database_at_once(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom pathlib import Path\nfrom kedge.fleet.service import FleetService\n"
        "for folder in range(40):\n"
        "    while time.time() < float(sys.argv[2]) + folder * 0.1: pass\n"
        "    FleetService(Path(sys.argv[1]) / str(folder)).close()\n"
    )
    together = str(time.time() + 2.0)
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path), together], stderr=subprocess.PIPE)
        for _ in range(3)
    ]
    for process in started:
        said = process.communicate()[1].decode()
        assert process.returncode == 0, said
    for folder in range(40):
        with FleetService(tmp_path / str(folder)) as fleet:
            assert fleet.devices() == ()


def test_a_database_of_another_version_or_none_is_left_alone(tmp_path: Path) -> None:
    FleetService(tmp_path).close()
    with sqlite3.connect(tmp_path / "fleet.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(FleetError, match="schema is version 99"):
        FleetService(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "fleet.db").write_bytes(b"this is no database, but long enough to be looked at" * 40)
    with pytest.raises(FleetError, match="not a sound database"):
        FleetService(other)
    with pytest.raises(StorageError, match="cannot be made"):
        FleetService(tmp_path / "fleet.db" / "below")


def test_the_state_folder_is_found_in_this_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("KEDGE_FLEET_STATE", "KEDGE_DATA", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert state_folder() == tmp_path / ".local/share/kedge/fleet"
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert state_folder() == tmp_path / "xdg/kedge/fleet"
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "data"))
    assert state_folder() == tmp_path / "data/fleet"
    monkeypatch.setenv("KEDGE_FLEET_STATE", str(tmp_path / "state"))
    assert state_folder() == tmp_path / "state"
    assert state_folder(tmp_path / "given") == tmp_path / "given"


def test_a_list_of_rollouts_counts_as_each_rollouts_status_does(fleet: FleetService) -> None:
    for name, site in (("a", "berlin"), ("b", "berlin"), ("c", "paris")):
        fleet.device_add(name, "rpi4", {"site": site})
    fleet.rollout_start("tiny:1.0")
    fleet.rollout_start("tiny:2.0", {"site": "berlin"})
    fleet.rollout_start("other:1.0", {"site": "paris"})
    fleet.rollout_start("tiny:1.0", {"site": "berlin"})
    found = {one.id: (one.state, one.done, one.counts) for one in fleet.rollouts()}
    statuses = [fleet.rollout_status(number) for number in found]
    assert found == {one.id: (one.state, one.done, one.counts) for one in statuses}
    assert found[1] == ("active", False, {"offline": 1, "superseded": 2})
    assert found[2] == ("superseded", False, {"superseded": 2})
