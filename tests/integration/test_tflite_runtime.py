"""LiteRT on this machine: loading, kernel sets, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kedge_protocol.errors import ConfigError, InputError, VerificationError
from kedge_targets.backends.tflite.runtime import BUILTIN, XNNPACK, Runtime

pytestmark = [pytest.mark.shared_data, pytest.mark.device]


@pytest.fixture
def int8_model(shared_data: Path) -> Path:
    return shared_data / "models" / "ic_resnet8_int8.tflite"


def pictures(count: int) -> list[np.ndarray]:  # type: ignore[type-arg]
    source = np.random.default_rng(3)
    return [source.integers(-128, 128, (1, 32, 32, 3)).astype(np.int8) for _ in range(count)]


def test_both_kernel_sets_run_and_are_not_the_same(int8_model: Path) -> None:
    sessions = [Runtime().load(int8_model, {"threads": 1}, kernel_set=name) for name in (XNNPACK, BUILTIN)]
    rows = [[session.run([picture])[0] for picture in pictures(30)] for session in sessions]
    assert rows[0][0].shape == (1, 10)
    assert rows[0][0].dtype == np.int8
    assert not np.array_equal(rows[0], rows[1])


def test_a_kernel_set_of_its_own_choice_is_the_first(int8_model: Path) -> None:
    assert Runtime().kernel_sets[0] == XNNPACK
    rows = [
        [Runtime().load(int8_model, {}, kernel_set=name).run([p])[0] for p in pictures(5)] for name in (None, XNNPACK)
    ]
    assert np.array_equal(rows[0], rows[1])


def test_answers_belong_to_the_caller(int8_model: Path) -> None:
    session = Runtime().load(int8_model, {})
    first, second = pictures(2)
    (kept,) = session.run([first])
    copy = kept.copy()
    session.run([second])
    assert np.array_equal(kept, copy)


def test_a_file_that_the_runtime_rejects_is_refused_with_its_own_reason(shared_data: Path) -> None:
    with pytest.raises(VerificationError, match="quantized_dimension"):
        Runtime().load(shared_data / "models" / "person_detect_rejected_by_litert.tflite", {})


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(b"no model" * 100)
    with pytest.raises(VerificationError, match=r"model\.tflite"):
        Runtime().load(path, {})


def test_wrong_arrays_options_and_kernel_sets_are_refused(int8_model: Path) -> None:
    session = Runtime().load(int8_model, {})
    for wrong in (np.zeros((1, 3, 32, 32), np.int8), np.zeros((1, 32, 32, 3), np.float32)):
        with pytest.raises(InputError, match="cannot run"):
            session.run([wrong])
    for options, kernel_set in (({"threads": -1}, None), ({"speed": 1}, None), ({}, "fast")):
        with pytest.raises(ConfigError):
            Runtime().load(int8_model, options, kernel_set=kernel_set)
