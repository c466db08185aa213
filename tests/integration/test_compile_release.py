"""Compiling a small model for real: what lies in OUT, what the command says, what Python gets."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support.bundles import samples
from tests.support.compiling import Inputs, scores, small_inputs

import kedge
from kedge.cli.compile import SOME_FAILED
from kedge.cli.main import main
from kedge_agent.model import Model
from kedge_protocol import digest, golden
from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.bundle.layout import Layout

UNCOMPILABLE = """
name = "{name}"
title = "A board whose backend is given an option that it does not know"
[processor]
architecture = "x86_64"
[system]
os = "Linux"
memory_bytes = 1000000
[[backends]]
name = "onnxruntime"
options = {{ threads = -5 }}
"""


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return small_inputs(tmp_path)


def board(folder: Path, name: str) -> str:
    path = folder / f"{name}.toml"
    path.write_text(UNCOMPILABLE.format(name=name))
    return str(path)


def compiled(inputs: Inputs, **changes: object) -> kedge.Release:
    given: dict[str, object] = {
        "name": "tiny",
        "version": "1.0",
        "targets": ["generic-cpu"],
        "calibration": inputs.calibration,
        "evaluation": inputs.evaluation,
        "out": inputs.out,
        "max_drop": 0.05,
    }
    return kedge.compile(inputs.model, **{**given, **changes})  # type: ignore[arg-type]  # a test's shorthand


def test_the_release_is_whole_and_its_report_has_the_figures(inputs: Inputs) -> None:
    before = digest.of_file(inputs.model)
    release = compiled(inputs)
    assert digest.of_file(inputs.model) == before
    Layout(inputs.out).verify()
    assert sorted(path.name for path in inputs.out.iterdir()) == [
        "blobs",
        "index.json",
        "oci-layout",
        "recipe.toml",
        "report.html",
        "report.json",
        "search.json",
    ]
    assert sorted(path.name for path in inputs.out.parent.iterdir() if path.name.startswith(".")) == []
    report = json.loads((inputs.out / "report.json").read_text())
    assert report["metric"] == "top1"
    assert report["model"]["digest"] == before
    assert report["reference"]["value"] == 1.0
    assert report["reference"]["size_bytes"] == inputs.model.stat().st_size
    (entry,) = report["bundles"]
    bundle = release.bundles["generic-cpu"]
    assert entry["target"] == "generic-cpu"
    assert entry["precision"] == "int8" == bundle.config.precision
    assert entry["digest"] == bundle.digest
    assert entry["size_bytes"] == bundle.model_bytes
    assert entry["drop"] == pytest.approx(1.0 - entry["value"])
    assert entry["drop"] <= 0.05
    assert 0 < entry["latency_ms"]["p50"] <= entry["latency_ms"]["p95"]
    assert entry["verified"] == "executed"
    assert entry["cost"]["cpu_ms"] > 0
    joules = entry["cost"].get("joules")
    assert (joules is None) == ("no sensor tells energy" in (inputs.out / "report.html").read_text())
    assert joules is None or joules > 0
    assert (entry["calibration_samples"], entry["evaluation_samples"]) == (64, 96)


def test_the_value_is_what_the_packed_file_gives(inputs: Inputs) -> None:
    release = compiled(inputs)
    data = np.load(inputs.evaluation)
    answers = Model(inputs.out, target="generic-cpu")(data["input"])
    answers = answers["scores"] if isinstance(answers, dict) else answers
    assert release.report is not None
    assert release.report.bundles[0].attempts[-1].value == np.mean(answers.argmax(axis=1) == data["label"])


def test_golden_vectors_are_of_the_evaluation_set_and_of_this_file(inputs: Inputs) -> None:
    bundle = compiled(inputs).bundles["generic-cpu"]
    vectors = golden.load(Layout(inputs.out).blob_path(bundle.files[bundle.config.golden.file].digest))
    assert vectors.samples == bundle.config.golden.samples >= 8
    evaluation = {row.tobytes() for row in np.load(inputs.evaluation)["input"]}
    assert all(row.tobytes() in evaluation for row in vectors.inputs["input"])
    answers = Model(inputs.out, target="generic-cpu")(vectors.inputs["input"])
    answers = answers["scores"] if isinstance(answers, dict) else answers
    assert all(found.holds for found in golden.compare(vectors, {"scores": answers}))


def test_float32_is_taken_where_nothing_smaller_holds_and_the_report_says_so(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = inputs.model.parent / "exact.py"
    expected = scores(inputs.model, np.load(inputs.evaluation)["input"])
    np.save(inputs.model.parent / "expected.npy", expected)
    exact.write_text(
        "import numpy as np\nfrom pathlib import Path\n"
        "EXPECTED = np.load(Path(__file__).parent / 'expected.npy')\n"
        "def f(outputs, inputs, labels):\n"
        "    return -float(np.abs(outputs['scores'] - EXPECTED).max())\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments(metric=f"{exact}:f", max_drop="0.00001", effort="quick"))
    assert exit_.value.code == 0
    report = json.loads((inputs.out / "report.json").read_text())
    assert report["metric"] == "exact.py:f"
    (entry,) = report["bundles"]
    assert entry["precision"] == "float32"
    assert [attempt["precision"] for attempt in entry["attempts"]] == ["int8", "float16", "float32"]
    assert entry["attempts"][0]["reason"].startswith("dropped by")
    assert entry["calibration_samples"] == 0
    # The report says what was tried; to look is the search's work and no reason to warn.
    assert report["warnings"] == []
    assert "warning" not in capsys.readouterr().out
    config = Layout(inputs.out).bundle("generic-cpu").config
    assert config.precision == "float32"
    assert config.provenance.calibration_digest is None


def test_scores_that_nothing_tells_to_be_of_classes_are_no_answers_unless_the_user_says_so(inputs: Inputs) -> None:
    np.savez(inputs.evaluation, input=samples(50, seed=9))
    report = compiled(inputs).report
    assert report is not None
    assert report.metric == "cosine"
    assert report.bundles[0].agreement is None
    report = compiled(inputs, metric="agreement:scores", force=True).report
    assert report is not None
    assert report.metric == "agreement:scores"
    assert report.reference.value == 1.0
    assert report.bundles[0].value == report.bundles[0].agreement


def test_one_target_that_fails_does_not_stop_the_others(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments(targets=[board(inputs.model.parent, "odd"), "generic-cpu"]))
    assert exit_.value.code == SOME_FAILED
    said = capsys.readouterr()
    assert "error: odd: " in said.err
    assert "generic-cpu" in said.out
    assert set(Layout(inputs.out).release().bundles) == {"generic-cpu"}
    report = json.loads((inputs.out / "report.json").read_text())
    assert [failure["target"] for failure in report["failures"]] == ["odd"]
    assert "odd" in (inputs.out / "report.html").read_text()


def test_in_python_the_failures_are_on_the_release(inputs: Inputs) -> None:
    release = compiled(inputs, targets=[board(inputs.model.parent, "odd"), "generic-cpu"])
    assert set(release.bundles) == {"generic-cpu"}
    assert set(release.failures) == {"odd"}
    assert "threads" in str(release.failures["odd"])


def test_when_all_fail_there_is_no_out(inputs: Inputs) -> None:
    odd = [board(inputs.model.parent, name) for name in ("odd", "strange")]
    with pytest.raises(kedge.errors.CompileError, match=r"odd: .*; strange: "):
        compiled(inputs, targets=odd)
    assert not inputs.out.exists()


def test_preprocessing_goes_into_the_bundle_and_acts_on_both_sides(inputs: Inputs) -> None:
    raw = np.random.default_rng(2).integers(0, 256, size=(200, 16), dtype=np.uint8)
    wanted = scores(inputs.model, ((raw / 255 - 0.5) / 0.25).astype(np.float32)).argmax(axis=1)
    np.savez(inputs.calibration, input=raw[:80])
    np.savez(inputs.evaluation, input=raw[80:], label=wanted[80:])
    release = compiled(inputs, preprocess="scale=1/255,mean=0.5,std=0.25")
    assert release.report is not None
    assert release.report.reference.value == 1.0
    assert release.report.bundles[0].value >= 0.95
    spec = release.bundles["generic-cpu"].config.inputs[0]
    assert spec.preprocess == Preprocess(scale=(1 / 255,), mean=(0.5,), std=(0.25,))
    answers = Model(inputs.out, target="generic-cpu")(raw[80:])
    answers = answers["scores"] if isinstance(answers, dict) else answers
    assert np.mean(answers.argmax(axis=1) == wanted[80:]) == release.report.bundles[0].value


def test_shared_samples_are_warned_of(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(inputs.calibration, input=np.concatenate([samples(64), np.load(inputs.evaluation)["input"][:5]]))
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments())
    assert exit_.value.code == 0
    assert "warning: 5 of 96 evaluation samples are among the calibration samples" in capsys.readouterr().out


def test_labels_are_in_the_bundle(inputs: Inputs) -> None:
    names = inputs.model.parent / "names.txt"
    names.write_text("ant\nbee\ncat\ndog\n")
    assert compiled(inputs, labels=names).bundles["generic-cpu"].config.labels == ("ant", "bee", "cat", "dog")


def test_force_replaces_out(inputs: Inputs) -> None:
    inputs.out.mkdir()
    (inputs.out / "oci-layout").touch()
    (inputs.out / "old.txt").touch()
    compiled(inputs, force=True)
    assert not (inputs.out / "old.txt").exists()
    Layout(inputs.out).verify()


def test_a_folder_of_npy_files_does_as_well(inputs: Inputs) -> None:
    folder = inputs.model.parent / "evaluation"
    folder.mkdir()
    data = np.load(inputs.evaluation)
    np.save(folder / "input.npy", data["input"])
    np.save(folder / "label.npy", data["label"])
    first = compiled(inputs)
    second = compiled(inputs, evaluation=folder, out=inputs.out.with_name("OUT2"))
    assert first.digest == second.digest


def test_inspect_shows_configuration_files_and_digests(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    release = compiled(inputs)
    bundle = release.bundles["generic-cpu"]
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(inputs.out)])
    assert exit_.value.code == 0
    said = capsys.readouterr().out
    shown = [release.digest, bundle.digest, bundle.manifest.config.digest, bundle.config.provenance.model_digest]
    shown += [layer.digest for layer in bundle.manifest.layers] + [layer.title for layer in bundle.manifest.layers]
    shown += [*json.loads(bundle.config_raw), "kernel_sets", "executed", bundle.config.metric.measured_on]
    assert [text for text in shown if text not in said] == []


def test_inspect_of_a_target_that_is_not_there(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(inputs)
    with pytest.raises(SystemExit) as exit_:
        main(["inspect", str(inputs.out), "--target", "rpi4"])
    assert exit_.value.code == 1
    assert "has no bundle for 'rpi4'. It has: generic-cpu" in capsys.readouterr().err
