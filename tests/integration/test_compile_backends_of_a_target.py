"""All backends of a target are candidates, and what was measured chooses among them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.support.compiling import small_inputs, unpacked_bundle

import kedge
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_targets import target
from kedge_targets.proof import ProveRequest, prove

TARGET = "intel-cpu"


def test_each_backend_of_a_target_is_tried_and_measured(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="tiny",
        version="1",
        targets=["intel-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
    )
    assert release.report is not None
    (entry,) = release.report.bundles
    measured = {one.backend: one for one in entry.attempts if one.latency_ms is not None}
    assert set(measured) == {one.name for one in target.find("intel-cpu").backends}
    assert release.bundles["intel-cpu"].config.backend == entry.backend
    assert entry.backend in measured
    losers = [one for one in entry.attempts[:-1] if one.backend != entry.backend]
    assert losers
    assert all(one.reason for one in losers)


def measured(bundle: Bundle, p50_ms: float) -> dict[str, object]:
    """What a device says of a bundle."""
    files = bundle.files[bundle.config.entry].digest
    return {"device": "own", "target": bundle.config.target, "files": files, "p50_ms": p50_ms, "p95_ms": p50_ms}


def test_a_release_holds_a_bundle_by_every_backend_and_a_devices_figures_choose(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)

    def compiled(**more: Any) -> kedge.Release:
        return kedge.compile(
            inputs.model,
            name="tiny",
            version="1",
            targets=[TARGET],
            calibration=inputs.calibration,
            evaluation=inputs.evaluation,
            out=inputs.out,
            max_drop=0.05,
            max_size="20x",  # so that no float is tried beside int8, whatever the machine measures
            **more,
        )

    release = compiled(every_backend=True)
    chosen, rival = release.candidates[TARGET]
    other = rival.config.backend
    assert {chosen.config.backend, other} == {one.name for one in target.find(TARGET).backends}
    opened = kedge.Release.open(inputs.out)
    assert [one.digest for one in opened.candidates[TARGET]] == [chosen.digest, rival.digest]
    assert release.bundles[TARGET] == chosen
    for one in (chosen, rival):
        folder = unpacked_bundle(release, one, tmp_path / one.config.backend)
        assert prove(ProveRequest(folder=str(folder), config=str(folder / "config.json")), lambda *_: None).holds
    assert release.report is not None
    assert [(one.name, one.digest) for one in release.report.bundles] == [
        (TARGET, chosen.digest),
        (f"{TARGET} by {other}", rival.digest),
    ]
    assert f"{TARGET} by {other}" in (inputs.out / "report.html").read_text()
    figures = {"measurements": [measured(chosen, 900.0), measured(rival, 0.001)]}
    (tmp_path / "latencies.json").write_text(json.dumps(figures))
    again = compiled(latencies=tmp_path / "latencies.json", force=True)
    assert again.bundles[TARGET].config.backend == other
    assert again.report is not None
    known = again.report.bundles[0].target_latency
    assert known is not None
    assert known.source == "measured by own"


@pytest.mark.usefixtures("ncnn_toolchain")
@pytest.mark.packages("ncnn")
def test_each_runtime_of_rpi5_and_rpi4_has_a_bundle_in_one_release_and_figures_choose(
    tmp_path: Path,
) -> None:
    inputs = small_inputs(tmp_path)
    boards = ("rpi5", "rpi4")

    def compiled(**more: Any) -> kedge.Release:
        return kedge.compile(
            inputs.model,
            name="tiny",
            version="1",
            calibration=inputs.calibration,
            evaluation=inputs.evaluation,
            out=inputs.out,
            max_drop=0.05,
            max_size="20x",
            **more,
        )

    # Quick tries the usual precision of each, and ends with none of them.
    release = compiled(targets=boards, every_backend=True, effort="quick")
    for board in boards:
        backends = {one.config.backend: one for one in release.candidates[board]}
        assert set(backends) == {one.name for one in target.find(board).backends}
        for name, bundle in backends.items():
            folder = unpacked_bundle(release, bundle, tmp_path / f"{board}-{name}")
            asked = ProveRequest(folder=str(folder), config=str(folder / "config.json"))
            # By the runtime's build for this machine.
            assert prove(asked, lambda *_: None).holds
    Layout(inputs.out).verify()
    last = release.candidates["rpi5"][-1]
    figures = [measured(one, 9.0) for one in release.candidates["rpi5"][:-1]] + [measured(last, 0.001)]
    (tmp_path / "latencies.json").write_text(json.dumps({"measurements": figures}))
    again = compiled(
        targets=["rpi5"], every_backend=True, effort="quick", latencies=tmp_path / "latencies.json", force=True
    )
    assert again.candidates["rpi5"][0].config.backend == last.config.backend
    assert len(again.candidates["rpi5"]) == len(release.candidates["rpi5"])


def test_a_backend_that_is_not_usual_is_tried_only_where_all_are_asked_for(tmp_path: Path) -> None:
    board = target.find("generic-cpu")
    text = (target.DEVICES / "generic-cpu.toml").read_text().replace('name = "generic-cpu"', 'name = "own"')
    first = board.backends[0].name
    (tmp_path / "own.toml").write_text(
        text.replace("[runtimes]", '[[backends]]\nname = "openvino"\nusual = false\n[runtimes]')
    )
    inputs = small_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="tiny",
        version="1",
        targets=[str(tmp_path / "own.toml")],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
    )
    assert release.report is not None
    assert {one.backend for one in release.report.bundles[0].attempts} == {first}
    assert len(release.candidates["own"]) == 1


def test_quick_ends_with_the_first_that_holds(tmp_path: Path) -> None:
    inputs = small_inputs(tmp_path)
    release = kedge.compile(
        inputs.model,
        name="tiny",
        version="1",
        targets=["intel-cpu"],
        calibration=inputs.calibration,
        evaluation=inputs.evaluation,
        out=inputs.out,
        max_drop=0.05,
        effort="quick",
    )
    assert release.report is not None
    assert {one.backend for one in release.report.bundles[0].attempts} == {"openvino"}
