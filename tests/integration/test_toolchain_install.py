"""Toolchains are installed whole or not at all, from hashes, safe for two at once; offline, with a tiny wheel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.conftest import ROOT
from tests.support import toolchains
from tests.support.waiting import wait_for

from kedge.cli.toolchain import toolchain as commands
from kedge_protocol.errors import ToolchainError
from kedge_targets import toolchain
from kedge_targets.toolchain import declaration
from kedge_targets.toolchain.installation import Versions


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's data folder and a declared toolchain ``tiny`` whose wheel is at hand; no index is asked."""
    wheels = tmp_path / "wheels"
    _, digest = toolchains.wheel(wheels)
    toolchains.declare(tmp_path / "backends", digest)
    monkeypatch.setattr(declaration, "BACKENDS", tmp_path / "backends")
    monkeypatch.setenv("KEDGE_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return tmp_path


def left(place: Path) -> list[str]:
    """What lies among the environments, locks aside."""
    return sorted(path.name for path in (place / "data" / "toolchains").iterdir() if path.suffix != ".lock")


def test_an_installed_toolchain_runs_its_driver_from_where_it_was_put(place: Path) -> None:
    steps: list[tuple[str, int, int]] = []
    installed = toolchain.install("tiny", lambda *step: steps.append(step))
    assert left(place) == [installed.folder.name]
    assert installed.folder.name == f"tiny-{declaration.read('tiny').key('.'.join(map(str, sys.version_info[:2])))}"
    assert ("fetching tiny", 1, 2) in steps
    with toolchain.find("tiny").worker() as worker:
        assert worker.call("version", {}, Versions, deadline=60).packages == {"tiny": "1.0"}
    # Once more: nothing happens.
    steps.clear()
    assert toolchain.install("tiny", lambda *step: steps.append(step)) == installed
    assert steps == []


def test_a_missing_toolchain_names_the_command_that_installs_it(place: Path) -> None:
    with pytest.raises(ToolchainError, match="kedge toolchain install tiny"):
        toolchain.find("tiny")
    with pytest.raises(ToolchainError, match="Known are tiny"):
        toolchain.find("huge")


def test_a_wrong_hash_leaves_nothing_and_pips_own_reason(place: Path) -> None:
    toolchains.declare(place / "backends", "0" * 64)
    with pytest.raises(ToolchainError, match="DO NOT MATCH THE HASHES") as caught:
        toolchain.install("tiny")
    assert left(place) == ["tiny-install.log"]
    assert str(place / "data" / "toolchains" / "tiny-install.log") in str(caught.value)


def test_an_environment_that_cannot_load_its_packages_is_not_put_in_place(place: Path) -> None:
    _, digest = toolchains.wheel(place / "wheels", module="import nothing_of_that_name\n")
    toolchains.declare(place / "backends", digest)
    with pytest.raises(ToolchainError, match="nothing_of_that_name"):
        toolchain.install("tiny")
    assert left(place) == ["tiny-install.log"]
    with pytest.raises(ToolchainError):
        toolchain.find("tiny")


def test_too_little_disk_space_is_said_before_anything_is_fetched(place: Path) -> None:
    toolchains.declare(place / "backends", "0" * 64, disk_bytes=1 << 60)
    with pytest.raises(ToolchainError, match="disk space"):
        toolchain.install("tiny")
    assert left(place) == []


def test_a_python_that_is_not_there_is_said(place: Path) -> None:
    toolchains.declare(place / "backends", "0" * 64, python="3.99")
    with pytest.raises(ToolchainError, match=r"needs Python 3\.99"):
        toolchain.install("tiny")


def test_another_lock_is_another_environment_and_remove_takes_all(place: Path) -> None:
    old = toolchain.install("tiny").folder
    lock = place / "backends" / "tiny" / "toolchain" / "requirements.txt"
    lock.write_text(lock.read_text() + "# renewed\n")
    with pytest.raises(ToolchainError):
        toolchain.find("tiny")
    new = toolchain.install("tiny").folder
    assert new != old
    (state,) = toolchain.list_toolchains()
    assert (state.folder, state.outdated) == (new, (old,))
    assert set(toolchain.remove("tiny")) == {old, new}
    assert left(place) == []


PROGRAM = textwrap.dedent("""
    import sys
    from pathlib import Path
    from kedge_targets import toolchain
    from kedge_targets.toolchain import declaration
    declaration.BACKENDS = Path(sys.argv[1])
    steps = []
    def report(what, done, total):
        steps.append(what)
        print(what, flush=True)
    print(toolchain.install("tiny", report).folder.name, flush=True)
""")


def started(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, str(place / "backends")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_two_installations_at_once_make_one_environment(place: Path) -> None:
    both = [started(place), started(place)]
    said = [process.communicate(timeout=300)[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert said[0][-1] == said[1][-1]
    assert left(place) == [said[0][-1]]
    waited = ["waiting for another installation" in lines for lines in said]
    built = ["unpacking" in lines for lines in said]
    assert sorted(built) == [False, True]
    assert waited == [not one for one in built] or waited == [False, False]


def test_an_installation_killed_half_way_leaves_nothing_in_place_and_the_next_one_cleans_up(place: Path) -> None:
    process = started(place)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "making the environment"
    wait_for(lambda: any(name.startswith(".staging-") for name in left(place)), what="a staging folder")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not [name for name in left(place) if name.startswith("tiny-") and not name.endswith(".log")]
    installed = toolchain.install("tiny")
    assert left(place) == [installed.folder.name]


def test_the_commands_install_list_and_remove(place: Path) -> None:
    run = CliRunner().invoke
    assert "not installed" in run(commands, ["list"]).output
    done = run(commands, ["install", "tiny"])
    assert done.exit_code == 0, done.output
    folder = str(toolchain.find("tiny").folder)
    assert folder in done.output
    assert folder in run(commands, ["list"]).output
    assert folder in run(commands, ["remove", "tiny"]).output
    assert "nothing was installed" in run(commands, ["remove", "tiny"]).output
