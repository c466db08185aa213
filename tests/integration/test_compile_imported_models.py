"""A model that is not ONNX through the whole command, and a step of somebody else's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tests.support.compiling import kedge, without_progress

import kedge as kedge_package
import kedge_agent

Array = npt.NDArray[Any]

NET = """\
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(16, 24)
        self.last = torch.nn.Linear(24, 4)

    def forward(self, features):
        return self.last(torch.relu(self.first(features)))

def small():
    torch.manual_seed(0)
    return Net()
"""


class Data:
    """A folder with the network's module, and data whose labels are the network's own answers."""

    def __init__(self, folder: Path) -> None:
        import torch

        self.folder = folder
        (folder / "nets_of_mine.py").write_text(NET)
        made: dict[str, Any] = {}
        exec(compile(NET, "nets_of_mine.py", "exec"), made)
        self.net = made["small"]()
        self.raw = np.random.default_rng(1).standard_normal((160, 16)).astype(np.float32)
        with torch.no_grad():
            self.scores: Array = self.net(torch.from_numpy(self.raw)).numpy()
        np.savez(folder / "calibration.npz", features=self.raw[:64])
        np.savez(folder / "evaluation.npz", features=self.raw[64:], label=self.scores[64:].argmax(axis=1))

    def arguments(self, source: str, *more: str) -> list[str]:
        calibration, evaluation = (str(self.folder / f"{which}.npz") for which in ("calibration", "evaluation"))
        given = ["--calibration", calibration, "--evaluation", evaluation, "-o", str(self.folder / "OUT")]
        names = ["--name", "net", "--version", "1", "--target", "generic-cpu", "--max-drop", "0.1"]
        return ["compile", source, *names, *given, *more]

    def check(self, precision: str = "int8") -> dict[str, Any]:
        """What the device answers agrees with the network; the report's bundle."""
        answers = kedge_agent.Model(self.folder / "OUT", target="generic-cpu")(self.raw[64:])
        assert np.mean(answers.argmax(axis=1) == self.scores[64:].argmax(axis=1)) >= 0.9
        (bundle,) = json.loads((self.folder / "OUT" / "report.json").read_text())["bundles"]
        found: dict[str, Any] = bundle
        assert found["precision"] == precision
        return found


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path)


def test_a_factory_of_a_module(data: Data) -> None:
    done = kedge(data.arguments("nets_of_mine:small"), env={**os.environ, "PYTHONPATH": str(data.folder)})
    assert done.returncode == 0, done.stderr
    data.check()


def test_an_exported_program(data: Data) -> None:
    import torch

    program = torch.export.export(
        data.net, (torch.from_numpy(data.raw[:2]),), dynamic_shapes={"features": {0: torch.export.Dim("batch")}}
    )
    torch.export.save(program, data.folder / "net.pt2")
    done = kedge(data.arguments(str(data.folder / "net.pt2")))
    assert done.returncode == 0, done.stderr
    data.check()


def test_a_module_in_python(data: Data) -> None:
    kedge_package.compile(
        data.net,
        name="net",
        version="1",
        targets=["generic-cpu"],
        calibration=data.folder / "calibration.npz",
        evaluation=data.folder / "evaluation.npz",
        out=data.folder / "OUT",
        max_drop=0.1,
    )
    data.check()


STEP = """\
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import onnx
from onnx import numpy_helper

from kedge.step import Context, Step
from kedge.options import Option


@dataclass(frozen=True, kw_only=True)
class PolishOptions:
    share: Annotated[float, Option("How much of each weight stays.")] = 1.0


class Polish(Step[PolishOptions]):
    name: ClassVar[str] = "polish"
    Options = PolishOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        made = onnx.ModelProto()
        made.CopyFrom(model)
        for tensor in made.graph.initializer:
            value = numpy_helper.to_array(tensor)
            if value.ndim == 2:
                tensor.CopyFrom(numpy_helper.from_array((value * np.float32(self.options.share)).copy(), tensor.name))
        context.notes.append("polished")
        context.figures["polish.share"] = self.options.share
        return made
"""


@pytest.fixture
def polish(data: Data) -> dict[str, str]:
    """The step, installed as a distribution of somebody else's; the environment that finds it."""
    (data.folder / "polish_of_mine.py").write_text(STEP)
    info = data.folder / "polish_of_mine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: polish-of-mine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kedge.steps]\npolish = polish_of_mine:Polish\n")
    return {**os.environ, "PYTHONPATH": str(data.folder)}


def test_a_third_partys_step_is_listed_run_and_written_into_the_recipe(data: Data, polish: dict[str, str]) -> None:
    listed = kedge(["step", "list"], env=polish)
    assert "polish" in listed.stdout
    assert "How much of each weight stays." in listed.stdout
    source = "nets_of_mine:small"
    how = ["--step", "polish:share=0.98", "--quantize", "precision=float32"]
    done = kedge(data.arguments(source, *how), env=polish)
    assert done.returncode == 0, done.stderr
    (step,) = data.check("float32")["steps"]
    assert step["figures"] == {"polish.share": 0.98}
    assert step["notes"] == ["polished"]
    recipe = data.folder / "recipe.toml"
    recipe.write_text((data.folder / "OUT" / "recipe.toml").read_text())
    done = kedge(data.arguments(source, "--recipe", str(recipe), "--force"), env=polish)
    assert done.returncode == 0, done.stderr
    assert data.check("float32")["steps"][0]["figures"] == {"polish.share": 0.98}


def test_an_option_that_the_step_does_not_know(data: Data, polish: dict[str, str]) -> None:
    done = kedge(data.arguments("nets_of_mine:small", "--step", "polish:shine=2"), env=polish)
    assert done.returncode == 1
    (said,) = without_progress(done.stderr)
    assert "shine" in said
    assert "share" in said
