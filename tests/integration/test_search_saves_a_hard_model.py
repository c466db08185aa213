"""A model whose activations have outliers: int8 collapses per tensor and per channel, the report names the layer, and
the search brings the model back within the budget by itself."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tests.support import hard

import kedge
from kedge.search import trial
from kedge_protocol.errors import BudgetError

MAX_DROP = 0.01


def compiled(model: hard.Hard, out: Path, **changes: object) -> kedge.Release:
    given: dict[str, object] = {
        "name": "hard",
        "version": "1.0",
        "targets": ["generic-cpu"],
        "calibration": model.calibration,
        "evaluation": model.evaluation,
        "out": out,
        "max_drop": MAX_DROP,
    }
    return kedge.compile(model.model, **{**given, **changes})  # type: ignore[arg-type]  # a test's shorthand


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> hard.Hard:
    return hard.made(tmp_path_factory.mktemp("hard"))


@pytest.mark.parametrize("granularity", ["per-tensor", "per-channel"])
def test_int8_collapses_whatever_scales_the_weights_have(model: hard.Hard, tmp_path: Path, granularity: str) -> None:
    with pytest.raises(BudgetError, match="dropped by"):
        compiled(model, tmp_path / "OUT", quantize=f"precision=int8,granularity={granularity},guard=false")
    assert not (tmp_path / "OUT").exists()
    (bundle,) = report_of(tmp_path / "OUT.nearest")["bundles"]
    assert bundle["drop"] > 0.5
    assert bundle["over"].startswith("dropped by")


@pytest.mark.parametrize("target", ["generic-cpu", "intel-cpu"])
def test_the_search_brings_it_back(model: hard.Hard, tmp_path: Path, target: str) -> None:
    compiled(model, tmp_path / "OUT", targets=[target])
    report = report_of(tmp_path / "OUT")
    (bundle,) = report["bundles"]
    assert bundle["drop"] <= MAX_DROP
    assert bundle["precision"] == "int8"
    assert bundle["attempts"][0]["drop"] > 0.5
    assert all(attempt["reason"] for attempt in bundle["attempts"][:-1])
    # Each step with what it cost and won.
    assert bundle["steps"][0]["use"] in ("equalize", "split-outliers")
    assert bundle["steps"][0]["drop"] == pytest.approx(0.0, abs=MAX_DROP)
    assert bundle["steps"][0]["size_bytes"] > 0


def test_what_two_ways_begin_with_is_done_once_though_they_run_at_once(
    model: hard.Hard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Path] = []
    step = trial._step

    def slow(choice: Any, graph: str, plan: Any, folder: Path, *more: Any) -> None:
        done.append(folder)
        time.sleep(0.5)
        step(choice, graph, plan, folder, *more)

    monkeypatch.setattr(trial, "_step", slow)
    compiled(model, tmp_path / "OUT", jobs=2)
    assert done
    assert len(done) == len(set(done))


def test_the_report_names_the_layer(model: hard.Hard, tmp_path: Path) -> None:
    compiled(model, tmp_path / "OUT")
    sensitivity = report_of(tmp_path / "OUT")["sensitivity"]
    worst = min(sensitivity["layers"], key=lambda layer: layer["sqnr_db"]["int8"])
    assert worst["name"] == hard.LOUD
    assert worst["drop"]["int8"] > 0.5
    assert all(layer["drop"]["int8"] < 0.05 for layer in sensitivity["layers"] if layer["name"] != hard.LOUD)
    assert hard.LOUD in (tmp_path / "OUT" / "report.html").read_text()


def test_where_nothing_can_be_evened_out_one_channel_is_computed_apart(tmp_path: Path) -> None:
    model = hard.made(tmp_path, homogeneous=False)
    compiled(model, tmp_path / "OUT")
    (bundle,) = report_of(tmp_path / "OUT")["bundles"]
    assert bundle["drop"] <= MAX_DROP
    assert bundle["precision"] == "int8"
    assert bundle["steps"][0]["use"] == "split-outliers"
    assert bundle["steps"][0]["figures"] == {"split-outliers.activations": 1, "split-outliers.channels": 1}
    assert bundle["steps"][0]["drop"] == pytest.approx(0.0, abs=0.002)
    others = {layer["name"]: layer for layer in bundle["layers"]}
    assert hard.LOUD not in others
    assert others[f"{hard.LOUD}_outliers"]["precision"] == "float32"
    assert "split-outliers" in others[f"{hard.LOUD}_outliers"]["why"]


def test_where_many_channels_are_loud_the_layer_stays_in_float_and_it_is_said_why(tmp_path: Path) -> None:
    model = hard.made(tmp_path, homogeneous=False, loud_units=12)
    compiled(model, tmp_path / "OUT")
    (bundle,) = report_of(tmp_path / "OUT")["bundles"]
    assert bundle["drop"] <= MAX_DROP
    kept = {layer["name"]: layer for layer in bundle["layers"]}
    assert kept[hard.LOUD]["precision"] == "float32"
    assert "dB" in kept[hard.LOUD]["why"]
    one = next(attempt for attempt in bundle["attempts"] if attempt["label"].endswith("1 layer float32)"))
    assert one["drop"] <= MAX_DROP
    recipe = (tmp_path / "OUT" / "recipe.toml").read_text()
    assert f'{hard.LOUD} = "float32"' in recipe


def test_the_recipe_gives_the_same_release_again(model: hard.Hard, tmp_path: Path) -> None:
    first = compiled(model, tmp_path / "first")
    again = compiled(model, tmp_path / "again", recipe=tmp_path / "first" / "recipe.toml")
    assert again.digest == first.digest
    (bundle,) = report_of(tmp_path / "again")["bundles"]
    assert len(bundle["attempts"]) == 1


def test_with_the_recorded_latencies_the_choice_is_the_same(model: hard.Hard, tmp_path: Path) -> None:
    first = compiled(model, tmp_path / "first")
    again = compiled(model, tmp_path / "again", latencies=tmp_path / "first" / "search.json")
    assert again.digest == first.digest
    (bundle,) = report_of(tmp_path / "again")["bundles"]
    assert bundle["target_latency"]["source"] == "recorded in an earlier search"
