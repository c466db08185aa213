"""Sketches: what is counted is what comes in, the index grows with the shift, and chance raises no alarm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.drawn_sketches import shifts

from kedge_agent import observing
from kedge_agent.observing import Observer
from kedge_agent.sketches import Sketch, SketchReader
from kedge_protocol import drift
from kedge_protocol.bundle import config as cfg
from kedge_protocol.drift import REPEATS, Kind, Statistic, Stream, repeat_effect
from kedge_protocol.errors import BundleError
from kedge_targets import drift as measuring

pytestmark = pytest.mark.device

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64
counts = st.lists(st.integers(0, 50), min_size=4, max_size=4)
STREAMS = (
    Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(0.0, 1.0), counts=(5, 5, 5)),
    Stream(kind=Kind.OUTPUT, tensor="y", statistic=Statistic.CLASS, edges=(0.5,), counts=(5, 5)),
)


def spec(name: str, shape: tuple[int | None, ...]) -> cfg.TensorSpec:
    file = cfg.FileTensor(name=name, index=0, shape=shape, dtype="float32")
    return cfg.TensorSpec(name=name, shape=shape, dtype="float32", file=file)


@given(one=counts, other=counts)
def test_the_index_is_nothing_for_equal_shares_symmetric_and_never_below_zero(one: list[int], other: list[int]) -> None:
    assert drift.psi(one, one) == 0
    assert drift.psi(one, other) == pytest.approx(drift.psi(other, one))
    assert drift.psi(one, other) >= 0


def test_the_index_is_that_of_the_formula() -> None:
    # Shares of (1.5, 3.5) / 5 and (3.5, 1.5) / 5: two terms of 0.4 ln(7/3).
    assert drift.psi([1, 3], [3, 1]) == pytest.approx(2 * 0.4 * np.log(3.5 / 1.5))


@pytest.mark.parametrize("samples", [30, 100, 400])
def test_samples_without_a_shift_hardly_ever_exceed_what_chance_makes(samples: int) -> None:
    chance = np.random.default_rng(samples)
    share = np.full(10, 0.1)
    runs = 400
    base = chance.multinomial(200, share, size=runs)
    live = chance.multinomial(samples, share, size=runs)
    above = sum(drift.psi(a, b) > drift.by_chance(a, b) for a, b in zip(base.tolist(), live.tolist(), strict=True))
    assert above <= 0.01 * runs


def test_a_real_shift_raises_the_alarm_and_names_its_stream() -> None:
    chance = np.random.default_rng(1)
    inputs, outputs = (spec("x", (None, 8)),), (spec("y", (None, 4)),)

    def drawn(shift: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        x = chance.normal(shift, 1, (300, 8)).astype(np.float32)
        return {"x": x}, {"y": chance.normal(0, 1, (300, 4)).astype(np.float32)}

    baseline = measuring.Baseline(inputs, outputs)
    for _ in range(3):
        baseline.add(*drawn(0.0))
    streams = baseline.streams()
    assert [stream.name for stream in streams] == [
        "input/x/mean", "input/x/spread", "output/y/class", "confidence/y/softmax"]  # fmt: skip
    drift.check(streams, where="test")

    def alarms(shift: float) -> list[str]:
        samples, answers = drawn(shift)
        live = {
            stream.name: np.bincount(
                [
                    stream.bin_of(value) or 0
                    for value in measuring.values(stream.statistic, {**samples, **answers}[stream.tensor])
                ],
                minlength=len(stream.counts),
            ).tolist()
            for stream in streams
        }
        return [shift.stream for shift in drift.shifts(streams, live) if shift.alarms]

    assert alarms(0.0) == []
    assert alarms(1.0) == ["input/x/mean"]


def test_the_values_are_those_of_their_definition() -> None:
    batch = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]], np.float32)
    assert measuring.values(Statistic.CLASS, batch).tolist() == [1, 0]
    assert measuring.values(Statistic.TOP, batch) == pytest.approx([0.7, 0.5])
    powers = np.exp(batch)
    assert measuring.values(Statistic.SOFTMAX, batch) == pytest.approx(powers.max(1) / powers.sum(1))
    assert measuring.values(Statistic.MEAN, batch) == pytest.approx(batch.mean(1))
    assert measuring.values(Statistic.SPREAD, batch) == pytest.approx(batch.std(1))
    big = np.arange(3 * 10**6, dtype=np.uint8).reshape(3, 1000, 1000)
    assert measuring.values(Statistic.MEAN, big) == pytest.approx(big.reshape(3, -1).mean(1), rel=0.02)


def test_a_tensor_that_never_changes_has_no_stream() -> None:
    baseline = measuring.Baseline((spec("x", (None, 3)),), ())
    baseline.add({"x": np.ones((50, 3), np.float32)}, {})
    assert baseline.streams() == ()


@pytest.mark.parametrize(
    "broken",
    [
        (STREAMS[0], STREAMS[0]),
        (Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(1.0, 0.0), counts=(1, 1, 1)),),
        (Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(1.0,), counts=(1, 1, 1)),),
        (Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(), counts=(1,)),),
    ],
)
def test_a_broken_baseline_is_refused(broken: tuple[Stream, ...]) -> None:
    with pytest.raises(BundleError, match="drift baseline"):
        drift.check(broken, where="test")


def test_what_processes_count_comes_in_once(tmp_path: Path) -> None:
    before = Sketch(tmp_path, digest=A, streams=STREAMS)
    before.add(0, 0.5)
    reader = SketchReader(tmp_path)
    # What was counted before the agent's start belongs to no interval.
    assert reader.take(A, STREAMS) == {}
    before.add(0, -1.0)
    before.add(1, 1.0)
    before.add(1, float("nan"))
    assert reader.take(A, STREAMS) == {"input/x/mean": (1, 0, 0), "output/y/class": (0, 1)}
    assert reader.take(A, STREAMS) == {}
    code = (
        "import sys; from pathlib import Path; from kedge_agent.sketches import Sketch; "
        "from kedge_protocol.drift import *; "
        "s = (Stream(kind=Kind.INPUT, tensor='x', statistic=Statistic.MEAN, edges=(0.0, 1.0), counts=(5, 5, 5)), "
        "Stream(kind=Kind.OUTPUT, tensor='y', statistic=Statistic.CLASS, edges=(0.5,), counts=(5, 5))); "
        f"sketch = Sketch(Path(sys.argv[1]), digest={A!r}, streams=s); sketch.add(0, 7.0)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    before.add(0, 0.5)
    before.close()
    other = Sketch(tmp_path, digest=B, streams=STREAMS)
    other.add(0, 0.5)
    (tmp_path / "foreign").write_bytes(b"x" * 100)
    assert reader.take(A, STREAMS) == {"input/x/mean": (0, 1, 1)}
    # The files of those that are gone are removed, what the living one counted of another bundle is not ours.
    left = [path for path in tmp_path.iterdir() if path.name != "foreign"]
    assert len(left) == 1
    assert reader.take(A, STREAMS) == {}
    other.close()


def test_calls_are_looked_at_seldom_and_one_that_fails_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = type("Config", (), {"inputs": (spec("x", (None, 2)),), "outputs": (spec("y", (None, 2)),)})()
    sketch = Sketch(tmp_path, digest=A, streams=STREAMS)
    observer = Observer(config, sketch, STREAMS)
    reader = SketchReader(tmp_path)
    assert observer.due[0] == 0
    now = 10**12
    monkeypatch.setattr(observing, "perf_counter_ns", lambda: now)
    batch = np.array([[0.5, 0.5]] * 20, np.float32)
    observer.look({"x": batch}, {"y": batch[0]})
    # Of a batch eight samples at most; one sample may come without its batch axis.
    taken = reader.take(A, STREAMS)
    repeats = taken.pop(REPEATS)
    assert taken == {"input/x/mean": (0, 8, 0), "output/y/class": (1, 0)}
    # All eight are the same.
    assert repeat_effect(repeats) == 8.0
    assert observer.due[0] >= now + 50_000_000
    observer.look({}, {})
    assert reader.take(A, STREAMS) == {}
    observer.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from("ab"), counts), max_size=5))
def test_sketches_add_up_in_any_order(parts: list[dict[str, list[int]]]) -> None:
    forth: dict[str, list[int]] = {}
    back: dict[str, list[int]] = {}
    for part in parts:
        forth = drift.added(forth, part)
    for part in reversed(parts):
        back = drift.added(back, part)
    assert forth == back
    assert sum(map(sum, forth.values())) == sum(sum(map(sum, part.values())) for part in parts)


def test_inputs_that_repeat_raise_no_false_alarm_and_a_shift_is_still_told() -> None:
    # 80 pictures drawn 188 times, as a test set that is played again and again.
    found = [shifts(turn, pictures=80, samples=188) for turn in range(200)]
    # As (sum c)² / sum c² has it: 56 count.
    assert 50 < np.mean([judged.effective for judged, _ in found]) < 70
    assert sum(judged.alarms for judged, _ in found) <= 2
    assert sum(blind.alarms for _, blind in found) >= 10
    far = [shifts(turn, pictures=80, samples=188, scale=3.0)[0] for turn in range(200)]
    assert sum(one.alarms for one in far) >= 180


def test_samples_that_do_not_repeat_count_as_they_are() -> None:
    found = [shifts(turn, pictures=0, samples=300)[0].effective for turn in range(100)]
    assert np.mean(found) > 240
    assert min(found) > 130
    assert repeat_effect(None) == 1.0
