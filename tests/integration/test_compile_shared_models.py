"""The shared models through the real compiler, for all three targets: int8, within the drop, small, and the same bytes
each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.support.compiling import SHARED_MODELS, SHARED_TARGETS, shared_release

from kedge_agent.model import Model
from kedge_protocol.bundle.layout import Layout

pytestmark = [pytest.mark.shared_data, pytest.mark.slow]
MODELS = sorted(SHARED_MODELS)
LARGEST = {"ic": 0.32, "kws": 0.52}
"""Size of generic-cpu's and rpi4's files, of the float model's."""


@pytest.mark.parametrize("target", SHARED_TARGETS)
@pytest.mark.parametrize("short", MODELS)
def test_int8_holds_the_drop(shared_data: Path, short: str, target: str) -> None:
    release = shared_release(shared_data, short)
    assert not release.failures
    assert release.report is not None
    entry = next(bundle for bundle in release.report.bundles if bundle.target == target)
    int8 = next(one for one in entry.attempts if one.label == "int8")
    assert (int8.precision, int8.weights_in_integers, int8.macs_in_integers) == ("int8", 1.0, 1.0)
    assert int8.drop is not None
    assert int8.drop <= SHARED_MODELS[short][2]
    assert int8.agreement is not None
    assert int8.agreement >= (0.94 if (short, target) == ("ic", "rpi4") else 0.95)
    assert entry.evaluation_samples == {"ic": 150, "kws": 800}[short]
    assert entry.verified == "executed"
    if entry.precision == "int8":
        assert entry.calibration_samples == SHARED_MODELS[short][1]
    else:  # without VNNI its integers are the slower ones, which is said
        assert any(remark.startswith("slower than float") for remark in int8.remarks)
        assert target != "rpi4"


def test_answers_that_differ_are_brought_back_where_agreement_is_asked_for(shared_data: Path) -> None:
    # As it comes TFLite answers more samples rightly than the float model does, and 8 of 150 otherwise.
    release = shared_release(shared_data, "ic", 0, ("rpi4",), min_agreement=0.95)
    assert release.report is not None
    (entry,) = release.report.bundles
    assert entry.attempts[0].label == "int8"
    assert "agrees with the float model on 0.94" in entry.attempts[0].reason
    assert "wanted are 0.95" in entry.attempts[0].reason
    assert entry.drop <= SHARED_MODELS["ic"][2]
    assert entry.agreement is not None
    assert entry.agreement >= 0.95
    assert entry.size_ratio <= LARGEST["ic"]


@pytest.mark.parametrize("target", ["generic-cpu", "rpi4"])
@pytest.mark.parametrize("short", MODELS)
def test_the_files_are_small(shared_data: Path, short: str, target: str) -> None:
    release = shared_release(shared_data, short)
    float_bytes = (shared_data / "models" / SHARED_MODELS[short][0]).stat().st_size
    assert release.bundles[target].model_bytes <= LARGEST[short] * float_bytes


@pytest.mark.parametrize("target", SHARED_TARGETS)
@pytest.mark.parametrize("short", MODELS)
def test_the_figure_is_what_the_packed_files_give(shared_data: Path, short: str, target: str) -> None:
    release = shared_release(shared_data, short)
    assert release.report is not None
    entry = next(bundle for bundle in release.report.bundles if bundle.target == target)
    split = SHARED_MODELS[short][1]
    with np.load(shared_data / "eval" / f"{short}.npz") as data:
        raw, label = data["input"][split:], data["label"][split:]
    model = Model(release.path, target=target)
    answers = model(raw)
    answers = next(iter(answers.values())) if isinstance(answers, dict) else answers
    # The entry's own value is cross-fitted where several candidates kept the budget; the attempt's is of these files.
    assert np.mean(answers.argmax(axis=1) == label) == entry.attempts[-1].value
    assert abs(entry.value - entry.attempts[-1].value) <= 0.01


@pytest.mark.parametrize("short", ["ic", pytest.param("kws", marks=pytest.mark.campaign)])
def test_compiled_twice_the_digests_are_the_same(shared_data: Path, short: str) -> None:
    first, second = shared_release(shared_data, short), shared_release(shared_data, short, run=1)
    assert first.path != second.path
    assert {t: b.config_raw for t, b in first.bundles.items()} == {t: b.config_raw for t, b in second.bundles.items()}
    assert {t: b.digest for t, b in first.bundles.items()} == {t: b.digest for t, b in second.bundles.items()}
    assert first.digest == second.digest
    Layout(first.path).verify()


@pytest.mark.parametrize("short", MODELS)
def test_the_model_is_not_changed(shared_data: Path, short: str) -> None:
    release = shared_release(shared_data, short)
    sums = dict(
        reversed(line.split()) for line in (shared_data / "SHA256SUMS").read_text().splitlines() if line.strip()
    )
    file = SHARED_MODELS[short][0]
    listed = next(value for name, value in sums.items() if name.endswith(file))
    assert all(b.config.provenance.model_digest == f"sha256:{listed}" for b in release.bundles.values())


FEW_BITS = {
    # model, precision: drop and agreement of today, with a sample or two to spare; plain rounding of ic has 0.227,
    # 0.300, 0.653, of kws -0.006, 0.033, 0.256
    ("ic", "int4"): (0.027, 0.93),
    ("ic", "codebook4"): (0.1, 0.86),
    ("ic", "log4"): (0.12, 0.79),
    ("kws", "int4"): (0.005, 0.97),
    ("kws", "codebook4"): (0.01, 0.96),
    ("kws", "log4"): (0.035, 0.94),
}


@pytest.mark.parametrize(("short", "precision"), FEW_BITS)
def test_four_bits_hold_by_rounding_on_the_calibration_samples_alone(
    shared_data: Path, short: str, precision: str
) -> None:
    release = shared_release(shared_data, short, 0, ("generic-cpu",), max_drop=1.0, quantize=f"precision={precision}")
    assert release.report is not None
    (entry,) = release.report.bundles
    drop, agreement = FEW_BITS[short, precision]
    assert entry.precision == precision
    assert entry.drop <= drop
    assert entry.agreement is not None
    assert entry.agreement >= agreement
    assert entry.calibration_samples == SHARED_MODELS[short][1]


def test_a_fifth_of_the_size_is_found_within_the_drop(shared_data: Path) -> None:
    release = shared_release(shared_data, "ic", 0, ("generic-cpu",), max_size="0.2x")
    assert release.report is not None
    (entry,) = release.report.bundles
    assert entry.precision == "int4"
    assert entry.drop <= SHARED_MODELS["ic"][2]
    assert entry.size_ratio <= 0.2
