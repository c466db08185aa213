"""A backend of a third party is found by its entry point, compiles and runs; where it is broken it is named."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.compiling import kedge, small_inputs, without_progress

from kedge.compiler.release import Release

COMPILER = """
import shutil

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_targets.compiler_template import CompilerTemplate
from kedge_targets.contract import Lowered
from kedge_targets.graph import model_reader, signature
from kedge_targets.numerics import Numerics, Precision


class Compiler(CompilerTemplate):
    tools = "The mirror"
    known_options = frozenset({"shine"})

    @property
    def numerics(self):
        return Numerics(precisions=(Precision.FLOAT32,), schemes=(), mixed=False, layouts=("NCHW",))

    def quantized_for(self, target):
        return ()

    def lower_job(self, job):
        model = model_reader.load(job.graph)
        shutil.copyfile(job.graph, job.workdir / "mirror.bin")
        return Lowered(
            files={"mirror.bin": job.workdir / "mirror.bin"},
            entry="mirror.bin",
            inputs=signature.specs(signature.inputs(model)),
            outputs=signature.specs(signature.outputs(model)),
            runtimes=(RuntimeRequirement(distribution="onnxruntime", minimum="1.20"),),
            verified=Verified.EXECUTED,
            tools={"mirror": job.options["shine"]},
        )
"""
RUNTIME = """
from kedge_targets import contract


class Session(contract.Session):
    detail = "in the mirror"

    def __init__(self, entry):
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(entry), providers=["CPUExecutionProvider"])

    def run(self, inputs):
        names = [one.name for one in self._session.get_inputs()]
        return self._session.run(None, dict(zip(names, inputs)))


class Runtime(contract.Runtime):
    distributions = ("onnxruntime",)
    kernel_sets = ("default",)

    def load(self, entry, options, *, kernel_set=None):
        return Session(entry)
"""
BOARD = """
name = "looking-glass"
title = "A board of somebody else's"
[processor]
architecture = "x86_64"
[system]
os = "Linux"
memory_bytes = 1_000_000_000
[[backends]]
name = "mirror"
options = { shine = "bright" }
[runtimes]
onnxruntime = "1.20"
"""


@pytest.fixture
def mirror(tmp_path: Path) -> dict[str, str]:
    """The backend, installed as a distribution of somebody else's; the environment that finds it."""
    package = tmp_path / "mirror_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text('environment = {"MIRROR_TELEMETRY": "0"}\n')
    (package / "compiler.py").write_text(COMPILER)
    (package / "runtime.py").write_text(RUNTIME)
    (tmp_path / "board.toml").write_text(BOARD)
    info = tmp_path / "mirror_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mirror-of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedge.backends]\nmirror = mirror_of_mine\n")
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_third_partys_backend_compiles_and_runs(tmp_path: Path, mirror: dict[str, str]) -> None:
    inputs = small_inputs(tmp_path)
    done = kedge(inputs.arguments(targets=[str(tmp_path / "board.toml")], effort="quick"), env=mirror)
    assert done.returncode == 0, done.stderr
    bundle = Release.open(inputs.out).bundles["looking-glass"]
    assert (bundle.config.backend, bundle.config.precision) == ("mirror", "float32")
    assert bundle.config.provenance.tools["mirror"] == "bright"
    assert [title for title in bundle.files if title != bundle.config.golden.file] == ["mirror.bin"]
    script = f"""
import pathlib
import numpy
from kedge_agent import Model
from kedge_targets import registry
from kedge_targets.worker import environment
model = Model({str(inputs.out)!r}, target="looking-glass")
assert model(numpy.zeros((1, 16), numpy.float32)).shape == (1, 4)
assert "mirror" in registry.names()
here = pathlib.Path()
print(environment.of_child(here, here, None, None)["MIRROR_TELEMETRY"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **mirror},
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "0"), ran.stderr


@pytest.mark.parametrize(
    ("module", "text", "words"),
    [
        ("compiler", "import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("compiler", "class Compiler:\n    pass", "no kedge_targets.contract.Compiler"),
        ("__init__", "raise RuntimeError('not today')", "RuntimeError: not today"),
    ],
)
def test_a_broken_one_is_named_by_its_entry_point(
    tmp_path: Path, mirror: dict[str, str], module: str, text: str, words: str
) -> None:
    (tmp_path / "mirror_of_mine" / f"{module}.py").write_text(text)
    inputs = small_inputs(tmp_path)
    done = kedge(inputs.arguments(targets=[str(tmp_path / "board.toml")], effort="quick"), env=mirror)
    assert done.returncode == 1
    said = "\n".join(without_progress(done.stderr))
    assert "entry point kedge.backends: mirror = mirror_of_mine" in said
    assert words in said
