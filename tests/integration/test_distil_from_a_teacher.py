"""``--step distil:teacher=MODEL``: a small network learns from a large one, and is judged against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support.compiling import kedge
from tests.support.small_networks import Trained, block, fitted
from torch import nn

from kedge.demo import digits


@pytest.fixture(scope="module")
def data() -> tuple[Any, Any, Any, Any]:
    found = digits.load()
    return (
        (found.train / 16).astype(np.float32),
        found.train_label,
        (found.held_out / 16).astype(np.float32),
        found.held_out_label,
    )


@pytest.fixture(scope="module")
def teacher(data: tuple[Any, Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.manual_seed(0)
    layers = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 32), nn.Flatten(), nn.Linear(512, 10)]
    return fitted(layers, data, tmp_path_factory.mktemp("teacher"), epochs=5)


@pytest.fixture(scope="module")
def student(data: tuple[Any, Any, Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Two convolutions with the weights that it was born with."""
    torch.manual_seed(1)
    layers = [*block(1, 8), nn.MaxPool2d(2), *block(8, 16), nn.Flatten(), nn.Linear(256, 10)]
    return fitted(layers, data, tmp_path_factory.mktemp("student"), epochs=0)


def arguments(student: Trained, teacher: Path, folder: Path, step: str = "") -> list[str]:
    np.savez(folder / "calibration.npz", image=student.train)
    np.savez(folder / "evaluation.npz", image=student.held_out, label=student.held_out_label)
    return [
        "compile", str(student.graph), "--name", "digits", "--version", "1.0", "--target", "generic-cpu",
        "--calibration", str(folder / "calibration.npz"), "--evaluation", str(folder / "evaluation.npz"),
        "--max-drop", "0.05", "-o", str(folder / "OUT"), "--step", f"distil:teacher={teacher}{step}",
    ]  # fmt: skip


def test_a_fresh_student_learns_from_pictures_without_labels(
    student: Trained, teacher: Trained, tmp_path: Path
) -> None:
    done = kedge(arguments(student, teacher.graph, tmp_path, ",steps=600,learning_rate=0.005"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "OUT" / "report.json").read_text())
    (bundle,) = report["bundles"]
    assert report["reference"]["value"] == pytest.approx(teacher.top1, abs=1e-6)
    assert report["reference"]["teacher"] == teacher.graph.name
    assert report["reference"]["size_bytes"] == teacher.graph.stat().st_size
    assert report["model"]["size_bytes"] == student.graph.stat().st_size
    assert any("the teacher float.onnx" in note for note in report["notes"])
    assert student.top1 < 0.3
    assert bundle["value"] > teacher.top1 - 0.05
    assert bundle["size_ratio"] < student.graph.stat().st_size / teacher.graph.stat().st_size
    assert "teacher" in (tmp_path / "OUT" / "recipe.toml").read_text()


def test_a_teacher_that_is_not_there_is_refused_at_once(student: Trained, tmp_path: Path) -> None:
    done = kedge(arguments(student, tmp_path / "no.onnx", tmp_path))
    assert done.returncode != 0
    assert "no.onnx" in done.stderr
    assert "there is no such file" in done.stderr


def test_a_teacher_with_other_classes_is_refused_before_training(
    student: Trained, data: tuple[Any, Any, Any, Any], tmp_path: Path
) -> None:
    torch.manual_seed(2)
    other = fitted([nn.Flatten(), nn.Linear(64, 7)], data, tmp_path, epochs=0)
    done = kedge(arguments(student, other.graph, tmp_path))
    assert done.returncode != 0
    assert "its output 'scores' is float32 [?, 7], the student's 'scores' is float32 [?, 10]" in " ".join(
        done.stderr.split()
    )
