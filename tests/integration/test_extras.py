"""Each extra alone, with the README's set of versions, in a fresh environment: it does what it is for."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tomllib
from tests.conftest import ROOT
from tests.support.bundles import make_bundle, make_tflite_bundle, samples
from tests.support.distributions import Environment, Wheels, run

TORCH_MODEL = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))

    def forward(self, input):
        return self.body(input)

def make():
    return Net()
"""


def compiled(environment: Environment) -> Path:
    """``kedge compile`` of a PyTorch model, in that environment."""
    folder = environment.folder
    (folder / "net.py").write_text(TORCH_MODEL)
    for name, seed in (("calibration", 1), ("evaluation", 2)):
        np.savez(folder / f"{name}.npz", input=samples(96, seed=seed))
    line = "compile net.py:make --name net --version 1.0 --target generic-cpu --effort quick --max-drop 0.2"
    line += " --calibration calibration.npz --evaluation evaluation.npz -o OUT"
    run(environment.bin / "kedge", *line.split(), cwd=folder)
    return folder / "OUT"


ANSWER = """
import sys
import numpy as np
from kedge_agent import Model
print(Model(sys.argv[1], target=sys.argv[2])(np.load(sys.argv[3])).shape)
"""


def answers(environment: Environment, release: Path, target: str, given: np.ndarray) -> str:
    """The shape of what the installed agent answers."""
    np.save(environment.folder / "given.npy", given)
    return environment.python(ANSWER, release, target, environment.folder / "given.npy").strip()


def test_openvino_serves_on_a_device(wheels: Wheels, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(f"{wheels.agent}[openvino]", constraints="device.txt")
    release = make_bundle(tmp_path, backend="openvino")
    assert answers(environment, release, "generic-cpu", samples(3)) == "(3, 4)"


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("extra", "constraints"),
    [
        ("tflite", "device.txt"),
        pytest.param("tflite-legacy", "device-legacy.txt", marks=pytest.mark.campaign),
    ],
)
def test_tflite_serves_on_a_device(
    wheels: Wheels, tmp_path: Path, shared_data: Path, extra: str, constraints: str
) -> None:
    environment = Environment(tmp_path)
    environment.install(f"{wheels.agent}[{extra}]", constraints=constraints)
    with np.load(shared_data / "eval" / "ic.npz") as arrays:
        images = arrays["input"][:4]
    release = make_tflite_bundle(tmp_path, shared_data / "models" / "ic_resnet8_int8.tflite", images, "ic")
    assert answers(environment, release, "rpi4", images) == "(4, 10)"


@pytest.mark.campaign
@pytest.mark.parametrize(
    ("extra", "modules"), [("cluster", "distributed"), ("metrics", "pycocotools.coco jiwer"), ("keras", "keras")]
)
def test_what_a_small_extra_is_for_can_be_loaded(wheels: Wheels, tmp_path: Path, extra: str, modules: str) -> None:
    environment = Environment(tmp_path)
    environment.install(wheels.agent, f"{wheels.host}[{extra}]", constraints="host.txt")
    program = "import importlib, os, sys; os.environ['KERAS_BACKEND'] = 'numpy'\n"
    environment.python(program + "print(*map(importlib.import_module, sys.argv[1:]))", *modules.split())


@pytest.mark.campaign
@pytest.mark.timeout(3000)  # gigabytes are installed
@pytest.mark.parametrize("extra", ["compile", "host"])
def test_a_pytorch_model_is_compiled(wheels: Wheels, tmp_path: Path, extra: str) -> None:
    environment = Environment(tmp_path)
    environment.install(wheels.agent, f"{wheels.host}[{extra}]", constraints="host.txt")
    assert "onnxscript" in environment.distributions()
    out = compiled(environment)
    assert (out / "oci-layout").is_file()
    if extra == "host":
        manages_a_fleet(environment)


def manages_a_fleet(environment: Environment) -> None:
    """A controller with its own broker comes up, and a device is added, with a kit, and listed."""
    fleet = {"KEDGE_FLEET_STATE": str(environment.folder / "fleet")}
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def kedge(*arguments: str) -> str:
        done = subprocess.run(
            [environment.bin / "kedge", *arguments],
            cwd=environment.folder,
            env=inherited | fleet,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    command = [environment.bin / "kedge", "controller", "run", "--embedded", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        command, cwd=environment.folder, env=inherited | fleet, stderr=subprocess.PIPE, text=True
    ) as controller:
        try:
            assert controller.stderr is not None
            said = next((line for line in controller.stderr if re.search(r"127\.0\.0\.1:\d+", line)), None)
            assert said is not None
            kedge("device", "add", "d1", "--target", "rpi4", "--kit", "kit.tar.gz")
            assert json.loads(kedge("device", "list", "--json"))[0]["name"] == "d1"
        finally:
            controller.terminate()
            controller.communicate(timeout=300)
    assert (environment.folder / "kit.tar.gz").is_file()


def test_fleet_runs_a_controller_and_makes_a_kit_from_the_installed_agent(wheels: Wheels, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(wheels.agent, f"{wheels.host}[fleet]", constraints="host.txt")
    manages_a_fleet(environment)
    command = [environment.bin / "kedge", "controller", "run", "--embedded", "--page", "127.0.0.1:0"]
    without = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert without.returncode != 0
    assert "pip install 'kedge-host[page]'" in without.stderr
    run("tar", "-xzf", "kit.tar.gz", cwd=tmp_path)
    # Equal code gives an equal wheel, whether it comes from a checkout or from an installation.
    (made,) = (tmp_path / "wheels").glob("*.whl")
    environment.pip("install", "--quiet", "--no-deps", "--no-index", "--force-reinstall", made)
    environment.pip("check")
    environment.python("import kedge_agent.daemon, kedge_targets.worker.child")


_PAGE = """
import pathlib, urllib.request
from kedge.page.options import PageOptions
from kedge.page.server import serving
with serving(pathlib.Path("fleet"), PageOptions(page="127.0.0.1:0").parsed()) as url:
    for path in ("", "devices", "releases", "static/page.css", "static/page.js", "metrics", "api/v1/openapi.json"):
        assert urllib.request.urlopen(url + path).status == 200, path
"""


def test_page_serves_its_files_from_an_installation(wheels: Wheels, tmp_path: Path) -> None:
    environment = Environment(tmp_path)
    environment.install(wheels.agent, f"{wheels.host}[page]", constraints="host.txt")
    environment.python(_PAGE)


def test_every_extra_of_the_readme_is_there_and_has_a_test() -> None:
    named = set(re.findall(r"""\./(?:agent|host)\[([a-z-]+)\]|`\[([a-z-]+)\]`""", (ROOT / "README.md").read_text()))
    extras = {one for pair in named for one in pair if one}
    listed = set()
    for folder in ("agent", "host"):
        listed |= set(tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    assert {"host", "fleet", "tflite", "tflite-legacy", "onnxruntime", "openvino"} <= extras
    assert extras <= listed
