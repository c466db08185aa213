"""all-MiniLM-L6-v2, a sentence encoder: small, and still of the same meaning on sentences that nobody calibrated with.

Whether it is faster is shown by ``make bench ARGS=minilm``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import pytest
from tests.support import lowering, minilm

import kedge
import kedge_agent
from kedge_targets.numerics import Precision

pytestmark = pytest.mark.packages(*minilm.NEEDED)
Array = npt.NDArray[Any]
Encoder = Callable[[dict[str, Array]], Array]

FOUR_BITS = [Precision.INT4, Precision.CODEBOOK4, Precision.LOG4]
EIGHT_BITS = [Precision.CODEBOOK8, Precision.LOG8]
INT8 = """\
schema = 1

[target.generic-cpu]
step = [
    { use = "split-outliers", widening = false },
    { use = "equalize", spread = 5.0, strength = 0.6 },
]

[target.generic-cpu.quantize]
precision = "int8"
"""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("minilm") / "minilm.onnx"
    minilm.export(path)
    return path


def meanings(encoder: Encoder) -> Array:
    """Of each held-out sentence by itself, at its own length."""
    return np.concatenate([encoder(minilm.feed([sentence])) for sentence in minilm.held_out()])


@pytest.fixture(scope="module")
def wanted(graph: Path) -> Array:
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    return meanings(lambda feed: session.run(None, feed)[0])


def test_what_is_judged_was_never_seen() -> None:
    assert len(minilm.held_out()) >= 200
    assert not set(minilm.held_out()) & set(minilm.calibration())


def test_int8_means_the_same_and_weighs_a_quarter(graph: Path, wanted: Array, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(INT8)
    np.savez(tmp_path / "calibration.npz", **minilm.feed(minilm.calibration()))
    # Fewer than are judged in the end: the compiler runs them through each of its candidates.
    np.savez(tmp_path / "evaluation.npz", **minilm.feed(minilm.held_out()[:80]))
    kedge.compile(
        graph,
        name="minilm",
        version="1.0",
        targets=["generic-cpu"],
        calibration=tmp_path / "calibration.npz",
        evaluation=tmp_path / "evaluation.npz",
        out=tmp_path / "OUT",
        recipe=recipe,
    )
    (bundle,) = json.loads((tmp_path / "OUT" / "report.json").read_text())["bundles"]
    assert bundle["size_bytes"] <= 0.3 * graph.stat().st_size
    assert bundle["precision"] == "int8"
    # The split and the evening out are exact in float, and the report says which layers stay there.
    assert [step["drop"] for step in bundle["steps"]] == [pytest.approx(0, abs=1e-5)] * 2
    assert bundle["steps"][0]["figures"]["split-outliers.channels"] > 0
    assert any(layer["name"].endswith("_outliers") for layer in bundle["layers"])
    assert sum(layer["why"].startswith("the backend keeps it in float") for layer in bundle["layers"]) == 12
    assert any("attention" in note for note in bundle["notes"])
    model = kedge_agent.Model(tmp_path / "OUT", target="generic-cpu")
    found = minilm.cosines(meanings(lambda feed: model(**feed)), wanted)
    assert found.mean() >= 0.99
    assert found.min() >= 0.98


FEW_BITS = [
    one if one.value == "int4" else pytest.param(one, marks=pytest.mark.campaign) for one in (*FOUR_BITS, *EIGHT_BITS)
]
"""Rounding a transformer with compensation takes a minute: one of them in ``make test``."""


@pytest.mark.parametrize("precision", FEW_BITS)
def test_weights_of_few_bits_mean_the_same_at_their_true_size(
    graph: Path, wanted: Array, precision: Precision, tmp_path: Path
) -> None:
    lowered = lowering.lower("generic-cpu", graph, precision, minilm.Sentences(minilm.calibration()), tmp_path)
    encoder = lowering.executor("generic-cpu", lowered)
    found = minilm.cosines(meanings(lambda feed: encoder(feed)["meaning"]), wanted)
    assert found.mean() >= (0.97 if precision in FOUR_BITS else 0.995)
    share = lowering.size(lowered) / graph.stat().st_size
    assert share <= (0.17 if precision in FOUR_BITS else 0.265)
    # No other file or folder holds more of it.
    assert lowering.size(lowered) == sum(path.stat().st_size for path in lowered.files.values())


def test_openvino_keeps_the_meaning_by_itself(graph: Path, wanted: Array, tmp_path: Path) -> None:
    lowered = lowering.lower("intel-cpu", graph, Precision.INT8, minilm.Sentences(minilm.calibration()), tmp_path)
    encoder = lowering.executor("intel-cpu", lowered)
    found = minilm.cosines(meanings(lambda feed: encoder(feed)["meaning"]), wanted)
    assert found.mean() >= 0.985
    assert lowering.size(lowered) <= 0.3 * graph.stat().st_size
