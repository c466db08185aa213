"""What a user can get wrong: one clear error, a non-zero exit status, and no OUT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support.bundles import samples
from tests.support.compiling import Inputs, kedge, small_inputs, without_progress

from kedge.cli.main import main
from kedge_protocol import digest


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return small_inputs(tmp_path)


def refused(inputs: Inputs, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says; checks all that must hold whatever was wrong."""
    before = sorted(path.name for path in inputs.model.parent.iterdir())
    model = digest.of_file(inputs.model) if inputs.model.is_file() else ""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    said = without_progress(capsys.readouterr().err)
    assert len(said) == 1
    assert said[0].startswith("error: ")
    assert not inputs.out.exists()
    assert sorted(path.name for path in inputs.model.parent.iterdir()) == before
    assert not model or digest.of_file(inputs.model) == model
    return said[0]


def edited(inputs: Inputs, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(inputs.model)
    change(model)
    inputs.model.write_bytes(model.SerializeToString())


def test_a_file_that_is_no_onnx(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.model.write_bytes(b"\x00\x01this is a photograph")
    said = refused(inputs, inputs.arguments(), capsys)
    assert str(inputs.model) in said
    assert "is not an ONNX model" in said


def test_no_file(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.model.unlink()
    assert "there is no such file" in refused(inputs, inputs.arguments(), capsys)


def test_an_opset_too_new(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 999

    edited(inputs, change)
    assert "opset 999" in refused(inputs, inputs.arguments(), capsys)


def test_an_ir_version_too_new(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.ir_version = 99

    edited(inputs, change)
    assert "IR version 99" in refused(inputs, inputs.arguments(), capsys)


def test_an_unknown_operator_is_named_with_its_node(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.node[1].op_type = "Frobnicate"

    edited(inputs, change)
    said = refused(inputs, inputs.arguments(), capsys)
    assert "'Frobnicate'" in said
    assert "'relu1'" in said


def test_a_batch_fixed_to_several(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    def change(model: onnx.ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 4

    edited(inputs, change)
    said = refused(inputs, inputs.arguments(), capsys)
    assert "its batch is fixed to 4" in said
    assert "--batch-axis input=none" in said


def _with_nan(raw: np.ndarray) -> np.ndarray:
    raw = raw.copy()
    raw[7, 3] = np.nan
    return raw


@pytest.mark.parametrize("role", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda raw: {"pixels": raw}, "no array for input 'input'"),
        (lambda raw: {"input": raw, "more": raw}, "array 'more' is no input"),
        (lambda raw: {"input": raw[:, :7]}, "has shape 40x7, the model takes samplesx16"),
        (lambda raw: {"input": raw.astype(np.complex64)}, "complex64, which is not numeric"),
        (lambda raw: {"input": raw.astype("S8")}, "not numeric"),
        (lambda raw: {"input": raw, "label": np.zeros(39, int)}, "different numbers of samples: input 40, label 39"),
        (lambda raw: {"input": _with_nan(raw)}, "no value (NaN) in sample 7"),
        (lambda raw: {"input": raw[:0]}, "has no samples"),
    ],
)
def test_arrays_that_do_not_fit(
    inputs: Inputs,
    capsys: pytest.CaptureFixture[str],
    role: str,
    change: Callable[[np.ndarray], dict[str, Any]],
    said: str,
) -> None:
    path = inputs.calibration if role == "calibration" else inputs.evaluation
    np.savez(path, **change(samples(40)))
    line = refused(inputs, inputs.arguments(), capsys)
    assert said in line
    assert role in line


def test_labels_outside_the_classes(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(inputs.evaluation, input=samples(40), label=np.full(40, 4))
    assert "label holds 4, the model's 4 classes are 0 to 3" in refused(inputs, inputs.arguments(), capsys)


def test_too_few_evaluation_samples(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(inputs.evaluation, input=samples(7))
    assert "has 7 samples, at least 8 are needed" in refused(inputs, inputs.arguments(), capsys)


def test_an_unknown_target(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(inputs, inputs.arguments(targets=["toaster"]), capsys)
    assert "unknown target 'toaster'" in said
    assert "generic-cpu" in said


def test_a_broken_target_file(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    board = inputs.model.parent / "board.toml"
    board.write_text('name = "board"\nnonsense = 1\n')
    assert "board.toml" in refused(inputs, inputs.arguments(targets=[str(board)]), capsys)


def test_one_target_twice(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    assert "given twice" in refused(inputs, inputs.arguments(targets=["generic-cpu"] * 2), capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_drop": "-0.1"}, "--max-drop"),
        ({"max_drop": "nan"}, "--max-drop"),
        ({"min_agreement": "1.5"}, "--min-agreement"),
        ({"min_agreement": "nan"}, "--min-agreement"),
        ({"name": "a/b"}, "'a/b' is not a usable model name"),
        ({"version": ""}, "version"),
        ({"preprocess": "size=3"}, "--preprocess"),
        ({"preprocess": "mean=1:2"}, "mean has 2 values, input 'input' has 16 channels"),
        ({"metric": "nothing.py:f"}, "there is no file nothing.py"),
        ({"labels": "nothing.txt"}, "--labels nothing.txt"),
        ({"deadline": "0"}, "--deadline"),
    ],
)
def test_options_that_cannot_be_meant(
    inputs: Inputs, capsys: pytest.CaptureFixture[str], options: dict[str, str], said: str
) -> None:
    assert said in refused(inputs, inputs.arguments(**options), capsys)


def test_as_many_label_names_as_there_are_no_classes(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    names = inputs.model.parent / "names.txt"
    names.write_text("one\ntwo\nthree\n")
    said = refused(inputs, inputs.arguments(labels=str(names)), capsys)
    assert "holds 3 names, output 'scores' has 4" in said


def test_a_metric_that_raises(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    file = inputs.model.parent / "mine.py"
    file.write_text("def f(outputs, inputs, labels):\n    return outputs['missing']\n")
    assert "mine.py:f raised KeyError" in refused(inputs, inputs.arguments(metric=f"{file}:f"), capsys)


def test_a_metric_that_cannot_be_imported_is_refused_before_the_model_runs(
    inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    file = inputs.model.parent / "mine.py"
    file.write_text("import nothing_of_that_name\n")
    with pytest.raises(SystemExit):
        main(inputs.arguments(metric=f"{file}:f"))
    said = capsys.readouterr().err
    assert "mine.py cannot be imported: ModuleNotFoundError" in said
    assert "reference: evaluate" not in said


def test_options_that_only_language_models_take(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--context: is for language models only" in refused(inputs, inputs.arguments(context="64"), capsys)


def test_a_metric_that_takes_its_process_down(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    file = inputs.model.parent / "mine.py"
    file.write_text("import os, signal\ndef f(outputs, inputs, labels):\n    os.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments(metric=f"{file}:f"))
    assert exit_.value.code == 1
    said = without_progress(capsys.readouterr().err)
    assert said[0].startswith("error: worker 'reference': was killed by SIGSEGV")
    assert not inputs.out.exists()


def test_a_step_over_its_deadline(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    file = inputs.model.parent / "mine.py"
    file.write_text("import time\ndef f(outputs, inputs, labels):\n    time.sleep(600)\n")
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments(metric=f"{file}:f", deadline="3"))
    assert exit_.value.code == 1
    assert "deadline of 3 s" in capsys.readouterr().err
    assert not inputs.out.exists()


def test_no_precision_within_the_drop(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    # A metric that only the float model reaches: it counts outputs that are exactly those it saw first.
    file = inputs.model.parent / "mine.py"
    file.write_text(
        "from pathlib import Path\n"
        "def f(outputs, inputs, labels):\n"
        "    seen = Path(__file__).with_suffix('.seen')\n"
        "    first = not seen.exists()\n"
        "    seen.touch()\n"
        "    return 1.0 if first else 0.0\n"
    )
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments(metric=f"{file}:f", effort="quick"))
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert "none of 3 candidates keeps the budget" in said
    assert "dropped by 1, allowed are 0.05" in said
    assert not inputs.out.exists()


def test_out_is_there_already(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.out.mkdir()
    (inputs.out / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit) as exit_:
        main(inputs.arguments())
    assert exit_.value.code == 1
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        main([*inputs.arguments(), "--force"])
    assert exit_.value.code == 1
    assert "is no OCI image layout" in capsys.readouterr().err
    assert (inputs.out / "mine.txt").read_text() == "precious"


def test_an_option_left_out_is_a_usage_error(inputs: Inputs) -> None:
    done = kedge(["compile", str(inputs.model), "--name", "tiny"])
    assert done.returncode == 2
    assert "Missing option" in done.stderr


def test_the_same_through_a_process_of_its_own(inputs: Inputs) -> None:
    inputs.model.write_bytes(b"no model")
    done = kedge(inputs.arguments())
    assert done.returncode == 1
    assert without_progress(done.stderr)[0].startswith("error: ")
    assert done.stdout == ""
    assert not inputs.out.exists()
