"""Training inside ``kedge compile``: killed and gone on with, with labels and a loss of one's own, and what happens
where it leads nowhere."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.compiling import Inputs, kedge, small_inputs, without_progress
from tests.support.waiting import wait_for

from kedge_protocol.bundle.layout import Layout

STEPS = 800
TUNE = f"fine-tune:steps={STEPS},patience=1000,learning_rate=0.003"


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return small_inputs(tmp_path)


def training(inputs: Inputs, *more: str, step: str = TUNE, **options: str) -> list[str]:
    line = inputs.arguments(quantize="precision=codebook4", max_drop="0.5", **options)
    return [*line, "--step", step, *more]


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def digests(out: Path) -> list[str]:
    """Of the files that a device gets."""
    return sorted(layer.digest for layer in Layout(out).bundle("generic-cpu").files.values())


def step_of(out: Path) -> dict[str, Any]:
    (step,) = report(out)["bundles"][0]["steps"]
    found: dict[str, Any] = step
    return found


def test_killed_in_the_middle_it_goes_on_and_ends_in_the_same_bits(inputs: Inputs, tmp_path: Path) -> None:
    kept = tmp_path / "checkpoints"
    line = [sys.executable, "-m", "kedge.cli.main", *training(inputs, checkpoints=str(kept))]
    process = subprocess.Popen(line, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: list(kept.glob("*.pt")) or process.poll() is not None, what="a first checkpoint")
        assert process.poll() is None, "it ended before it was killed"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not inputs.out.exists()
    # The worker is a process of its own, and of the same group: nothing goes on behind our back.
    (left,) = kept.glob("*.pt")
    before = left.stat().st_mtime_ns
    time.sleep(0.5)
    assert left.stat().st_mtime_ns == before

    done = kedge(training(inputs, checkpoints=str(kept)))
    assert done.returncode == 0, done.stderr
    gone_on = step_of(inputs.out)
    assert any("went on from a checkpoint at step" in note for note in gone_on["notes"])
    resumed = digests(inputs.out)
    shutil.rmtree(inputs.out)
    done = kedge(training(inputs))
    assert done.returncode == 0, done.stderr
    assert not any("checkpoint" in note for note in step_of(inputs.out)["notes"])
    assert digests(inputs.out) == resumed


def labelled(inputs: Inputs, count: int = 64) -> None:
    """Labels for the calibration too."""
    with np.load(inputs.calibration) as arrays:
        raw = arrays["input"][:count]
    from tests.support.compiling import scores

    np.savez(inputs.calibration, input=raw, label=scores(inputs.model, raw).argmax(axis=1))


LOSS = """\
import torch

def loss(outputs, inputs, labels):
    assert set(inputs) == {"input"} and labels.dtype == torch.int64
    return torch.nn.functional.cross_entropy(outputs["scores"], labels) * FACTOR
"""


@pytest.mark.parametrize("own", [False, True])
def test_with_labels_and_a_loss_of_ones_own(inputs: Inputs, tmp_path: Path, own: bool) -> None:
    labelled(inputs)
    (tmp_path / "mine.py").write_text(LOSS.replace("FACTOR", "1"))
    options = {"loss": f"{tmp_path / 'mine.py'}:loss"} if own else {}
    done = kedge(training(inputs, step="distil:steps=200", **options))
    assert done.returncode == 0, done.stderr
    figures = step_of(inputs.out)["figures"]
    assert figures["distil.loss_after"] <= figures["distil.loss_before"]
    assert figures["distil.steps"] > 0


def test_a_loss_that_leaves_the_numbers_is_one_clear_error_that_names_the_step(inputs: Inputs, tmp_path: Path) -> None:
    labelled(inputs)
    (tmp_path / "mine.py").write_text(LOSS.replace("FACTOR", "(outputs['scores'].sum() * 1e38 * 1e38)"))
    done = kedge(training(inputs, step="distil:steps=50", loss=f"{tmp_path / 'mine.py'}:loss"))
    assert done.returncode == 1
    (said,) = without_progress(done.stderr)
    assert said.startswith("error: ")
    assert "the loss is" in said or "the loss was" in said
    assert "distil" in said
    assert not inputs.out.exists()


def test_a_repair_that_diverges_does_not_throw_away_what_was_found(inputs: Inputs, tmp_path: Path) -> None:
    """In a search the fine-tuning fails; what the cheap ways found is the answer, or lies beside OUT."""
    labelled(inputs)
    (tmp_path / "mine.py").write_text(LOSS.replace("FACTOR", "float('nan')"))
    done = kedge(
        inputs.arguments(max_drop="0", effort="high", loss=f"{tmp_path / 'mine.py'}:loss", jobs="1", max_size="10")
    )
    assert done.returncode == 1
    assert "keeps the budget" in done.stderr
    assert not inputs.out.exists()
    nearest = inputs.out.with_name("OUT.nearest")
    found = report(nearest)["bundles"][0]
    assert found["over"]
    failed = [attempt for attempt in found["attempts"] if "fine-tune" in attempt["label"]]
    assert failed
    assert all("the loss" in attempt["reason"] for attempt in failed)
    assert digests(nearest)


def test_a_budget_that_cannot_be_kept_says_how_near_it_came_and_keeps_that(inputs: Inputs) -> None:
    taken = inputs.out.with_name("OUT.nearest")
    taken.mkdir()
    (taken / "thesis.txt").write_text("years of work")
    done = kedge(inputs.arguments(max_size="10", effort="quick"))
    assert done.returncode == 1
    (said,) = without_progress(done.stderr)
    assert "keeps the budget" in said
    assert "allowed are 10" in said
    assert (taken / "thesis.txt").read_text() == "years of work"
    nearest = inputs.out.with_name("OUT.nearest-2")
    assert str(nearest) in said
    assert digests(nearest)
    assert report(nearest)["bundles"][0]["over"]
    assert not inputs.out.exists()


def test_one_calibration_sample_is_a_warning(inputs: Inputs) -> None:
    with np.load(inputs.calibration) as arrays:
        np.savez(inputs.calibration, input=arrays["input"][:1])
    done = kedge([*inputs.arguments(max_drop="0.9", quantize="precision=int8"), "--step", "distil:steps=10"])
    assert done.returncode == 0, done.stderr
    said = report(inputs.out)["warnings"]
    assert any("only 1 calibration sample:" in text for text in said)
    assert "only 1 calibration sample" in done.stdout + done.stderr
    assert any("only 1 calibration sample to learn from" in note for note in step_of(inputs.out)["notes"])


def test_an_unknown_key_of_a_recipe_is_named_with_its_place(inputs: Inputs, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('schema = 1\nstep = [{ use = "distil", temprature = 3.0 }]\n')
    done = kedge([*inputs.arguments(), "--recipe", str(recipe)])
    assert done.returncode == 1
    (said,) = without_progress(done.stderr)
    assert "temprature" in said
    assert "temperature" in said
    assert str(recipe) in said
    assert not inputs.out.exists()
