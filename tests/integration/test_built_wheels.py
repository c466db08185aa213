"""Two wheels from one tree: nothing is in both, each is whole without the other, a device gets no compiler."""

from __future__ import annotations

import email
import re
import runpy
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import ROOT
from tests.support.bundles import make_bundle, samples
from tests.support.distributions import Environment, Wheels, run

from kedge_protocol import __version__
from kedge_targets import registry
from kedge_targets import target as targets

PACKAGES = {"host": "kedge", "agent": "kedge_agent", "targets": "kedge_targets", "protocol": "kedge_protocol"}

IMPORT_ALL = """
import importlib, importlib.metadata
names = [str(path) for path in importlib.metadata.files("kedge-agent") if path.suffix == ".py"]
for name in sorted(names):
    if name.endswith("__main__.py"):
        continue
    importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
print(len(names))
"""

LOAD_ALL = """
from kedge_targets import registry, target
for name in registry.names():
    registry.runtime(name)
print(*registry.names())
print(*target.names())
"""

PROVE = """
import sys
from pathlib import Path
from kedge_agent import Model
from kedge_protocol.bundle.layout import Layout
from kedge_targets.proof import PROVE, ProveAnswer, ProveRequest
from kedge_targets.worker import Worker
release, folder = Path(sys.argv[1]), Path(sys.argv[2])
bundle = Layout(release).bundle("generic-cpu")
folder.mkdir()
for title, layer in bundle.files.items():
    (folder / title).write_bytes(Layout(release).blob_path(layer.digest).read_bytes())
(folder / "config.json").write_bytes(bundle.config_raw)
request = ProveRequest(folder=str(folder), config=str(folder / "config.json"))
with Worker(name="prove", log_dir=folder) as worker:
    answer = worker.call(PROVE, request, ProveAnswer, deadline=120)
    assert answer.deviations and all(one.holds for one in answer.deviations), answer
import numpy as np
print(Model(release, target="generic-cpu")(np.load(sys.argv[3])).shape)
"""


def content(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def metadata(wheel: Path) -> email.message.Message:
    (name,) = (name for name in content(wheel) if name.endswith(".dist-info/METADATA"))
    return email.message_from_bytes(zipfile.ZipFile(wheel).read(name))


def tracked() -> set[str]:
    """Every file that git keeps of the four packages and the boards' folder, by its place in a wheel."""
    folders = [f"{folder}/{package}" for folder, package in PACKAGES.items()]
    listed = run("git", "ls-files", "-co", "--exclude-standard", *folders, "firmware-configs", cwd=ROOT).stdout.split()
    there = [path for path in listed if (ROOT / path).is_file()]
    return {
        f"kedge_targets/{path}" if path.startswith("firmware-configs") else path.partition("/")[2] for path in there
    }


def test_each_file_of_the_tree_is_in_one_wheel_and_no_other_file_is(wheels: Wheels) -> None:
    agent, host = content(wheels.agent), content(wheels.host)
    assert not agent & host
    assert {name for name in agent | host if ".dist-info/" not in name} == tracked()
    assert all(any(name.endswith("/licenses/LICENSE") for name in names) for names in (agent, host))


def test_a_device_gets_no_compiler_no_pass_and_no_toolchain(wheels: Wheels) -> None:
    hosts = re.compile(r"^kedge/|/toolchain/|firmware-configs|/(compiler|conversion|passes)\.py$|backends/\w+/importer")
    assert [name for name in content(wheels.agent) if hosts.search(name)] == []
    assert len([name for name in content(wheels.host) if hosts.search(name)]) > 100


def test_both_have_the_trees_version_and_the_host_asks_for_that_agent(wheels: Wheels) -> None:
    assert metadata(wheels.agent)["Version"] == metadata(wheels.host)["Version"] == __version__
    needs = [need for need in metadata(wheels.host).get_all("Requires-Dist", []) if "extra ==" not in need]
    assert needs == [f"kedge-agent=={__version__}"]
    assert metadata(wheels.host)["Name"] == "kedge-host"


def test_the_agents_wheel_alone_imports_all_of_it_and_proves_and_runs_a_bundle(wheels: Wheels, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(f"{wheels.agent}[onnxruntime]", constraints="device.txt")
    assert not {"kedge", "kedge-host", "onnx", "nncf", "torch", "openvino", "jinja2"} & environment.distributions()
    assert int(environment.python(IMPORT_ALL)) > 100
    backends, known = environment.python(LOAD_ALL).splitlines()
    assert backends.split() == registry.names()
    assert known.split() == list(targets.names())
    release = make_bundle(tmp_path / "OUT")
    np.save(tmp_path / "samples.npy", samples(3))
    assert environment.python(PROVE, release, tmp_path / "slot", tmp_path / "samples.npy").strip() == "(3, 4)"
    assert __version__ in run(environment.bin / "kedge-agent", "--version", cwd=tmp_path).stdout
    assert not (environment.bin / "kedge").exists()


def test_the_host_alone_says_what_compiling_needs_and_going_leaves_the_agent_whole(
    wheels: Wheels, tmp_path: Path
) -> None:
    environment = Environment(tmp_path)
    environment.install(wheels.agent, wheels.host, constraints="host.txt")
    allowed = {"cffi", "click", "cryptography", "numpy", "paho-mqtt", "pycparser"}
    assert environment.distributions() <= allowed | {"kedge-agent", "kedge-host"}
    assert "rpi4" in run(environment.bin / "kedge", "target", "list", cwd=tmp_path).stdout
    arguments = "compile model.onnx --name n --version 1 --target rpi4 --calibration c.npz --evaluation e.npz -o OUT"
    refused = run(environment.bin / "kedge", *arguments.split(), cwd=tmp_path, check=False)
    assert refused.returncode != 0
    assert 'pip install "kedge-host[compile]"' in refused.stderr
    assert "Traceback" not in refused.stderr
    environment.pip("uninstall", "--quiet", "--yes", "kedge-host")
    (site,) = environment.folder.glob("venv/lib/python3*/site-packages")
    left = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.suffix != ".pyc"}
    assert content(wheels.agent) - {f"kedge_agent-{__version__}.dist-info/RECORD"} <= left
    assert not {name for name in content(wheels.host) if name in left}
    assert int(environment.python(IMPORT_ALL)) > 100


def test_what_a_device_needs_may_not_import_the_host(tmp_path: Path) -> None:
    cut = runpy.run_path(str(ROOT / "agent" / "agent_files.py"))
    for folder, package in PACKAGES.items():
        (tmp_path / folder / package).mkdir(parents=True)
        (tmp_path / folder / package / "__init__.py").touch()
    (tmp_path / "firmware-configs").mkdir()
    backend = tmp_path / "targets/kedge_targets/backends/new"
    backend.mkdir(parents=True)
    (backend.parent / "__init__.py").touch()
    (backend / "__init__.py").touch()
    (backend / "runtime.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import kedge_targets.backends.new.compiler\n"
        "def load():\n    from kedge_targets.rooms import late\n    return 'kedge_targets.task:run'\n"
    )
    (backend / "compiler.py").touch()
    for name in ("task", "other", "rooms/__init__", "rooms/late"):
        path = tmp_path / f"targets/kedge_targets/{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    agent, host = set(cut["of_agent"](tmp_path)), set(cut["of_host"](tmp_path))
    assert {name for name in agent if name.startswith("kedge_targets/")} == {
        f"kedge_targets/{name}.py"
        for name in (
            "__init__", "backends/__init__", "backends/new/__init__", "backends/new/runtime", "task",
            "rooms/__init__", "rooms/late",
        )
    }  # fmt: skip
    assert {"kedge_targets/other.py", "kedge_targets/backends/new/compiler.py"} == host - {"kedge/__init__.py"}
    (tmp_path / "targets/kedge_targets/rooms/late.py").write_text("import kedge.compiler\n")
    with pytest.raises(ValueError, match=r"late\.py: a device needs it, and it imports kedge\.compiler"):
        cut["of_agent"](tmp_path)
