"""What a board has, whether a design fits it, and what is said where it does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kedge_protocol.errors import ConfigError, LoweringError, TargetError
from kedge_targets import target as targets
from kedge_targets.backends.finn import bitfile, capacity
from kedge_targets.backends.finn.toolchain_client import Cost, HardwareLayer

LIMITS = {"LUT": 700.0, "BRAM_18K": 70.0, "URAM": 0.0, "DSP": 70.0}


def cost(*layers: tuple[str, int, float], fps: float = 1000.0) -> Cost:
    made = tuple(
        HardwareLayer(name=name, operator="MVAU", cycles=cycles, resources={**dict.fromkeys(LIMITS, 0.0), "LUT": lut})
        for name, cycles, lut in layers
    )
    slowest = max(made, key=lambda layer: layer.cycles)
    return Cost(
        layers=made,
        total={name: sum(layer.resources[name] for layer in made) for name in LIMITS},
        max_cycles=slowest.cycles,
        bottleneck=slowest.name,
        latency_cycles=sum(layer.cycles for layer in made),
        frames_per_second=fps,
        latency_ms=1.0,
    )


def require(fold: Cost, fastest: Cost, *, fits: bool, fps: float | None = None) -> None:
    capacity.require(
        fold, fastest, fits=fits, board_name="Pynq-Z2", limits=LIMITS, utilization=0.7, target_fps=fps
    )  # fmt: skip


def test_each_target_names_a_board_whose_capacity_is_known() -> None:
    found = [
        choice.options["board"]
        for name in targets.names()
        for choice in targets.find(name).backends
        if choice.name == "finn"
    ]
    assert sorted(found) == sorted(capacity.boards())
    for board in capacity.boards().values():
        assert board.source
        assert board.capacity["LUT"] > 50_000


def test_an_unknown_board_lists_those_there_are() -> None:
    with pytest.raises(TargetError, match="Pynq-Z2"):
        capacity.board("Basys3", where="target x")


def test_what_fits_and_is_fast_enough_passes() -> None:
    good = cost(("a", 100, 300.0), ("b", 50, 200.0))
    require(good, good, fits=True, fps=900.0)
    require(good, good, fits=True)


def test_a_board_too_small_names_the_resource_and_the_layer() -> None:
    large = cost(("small", 100, 300.0), ("large", 50, 800.0))
    with pytest.raises(LoweringError, match="1100 LUT, Pynq-Z2 has 1000") as caught:
        require(large, large, fits=False)
    assert caught.value.where == "layer 'large'"
    assert "larger board" in str(caught.value.remedy)


def test_a_speed_that_does_not_fit_names_the_one_that_would() -> None:
    wanted, possible = cost(("a", 10, 900.0), fps=10_000.0), cost(("a", 100, 300.0), fps=1234.9)
    with pytest.raises(LoweringError, match="9000 frames") as caught:
        require(wanted, possible, fits=False, fps=9000.0)
    assert "at most 1234 frames a second" in str(caught.value.remedy)


def test_an_unreachable_speed_names_the_slowest_layer() -> None:
    slow = cost(("conv", 100, 300.0), ("scores", 5, 1.0), fps=1000.0)
    with pytest.raises(LoweringError, match="cannot be reached") as caught:
        require(slow, slow, fits=True, fps=2000.0)
    assert caught.value.where == "layer 'conv'"
    assert "at most 1000 frames a second" in str(caught.value.remedy)


def test_the_memory_port_too_can_be_the_slowest() -> None:
    slow = cost(("IODMA_in", 100, 0.0), ("scores", 5, 1.0), fps=1000.0)
    with pytest.raises(LoweringError, match="smaller ones"):
        require(slow, slow, fits=True, fps=2000.0)


def settings(shape: list[int]) -> dict[str, Any]:
    shapes = {"idt": ["DataType['UINT8']"], "odt": ["DataType['INT16']"], "ishape_normal": [shape]}
    return {"driver_information": {"io_shape_dict": {**shapes, "oshape_normal": [[1, 10]]}}}


def test_a_bitfile_comes_with_its_hardware_description(tmp_path: Path) -> None:
    bit = tmp_path / "mine.bit"
    bit.write_bytes(b"bits")
    with pytest.raises(ConfigError, match=r"mine\.hwh"):
        bitfile.settings_for(bit, settings([1, 4]))
    bit.with_suffix(".hwh").write_text("<xml/>")
    assert bitfile.settings_for(bit, settings([1, 4])) == settings([1, 4])
    (tmp_path / "out").mkdir()
    copied = bitfile.copied(bit, tmp_path / "out")
    assert {title: path.read_bytes() for title, path in copied.items()} == {
        "finn-accel.bit": b"bits",
        "finn-accel.hwh": b"<xml/>",
    }


def test_a_bitfile_of_another_model_is_refused(tmp_path: Path) -> None:
    bit = tmp_path / "mine.bit"
    for path in (bit, bit.with_suffix(".hwh")):
        path.write_bytes(b"x")
    own = tmp_path / "settings.json"
    own.write_text(json.dumps(settings([1, 4])))
    assert bitfile.settings_for(bit, settings([1, 4])) == settings([1, 4])
    with pytest.raises(LoweringError, match="another model"):
        bitfile.settings_for(bit, settings([1, 5]))
    own.write_text("{}")
    with pytest.raises(ConfigError, match=r"settings\.json"):
        bitfile.settings_for(bit, settings([1, 4]))
