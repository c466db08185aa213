"""Telling a converted file's tensors by their numbers, which other kernels change a little."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from kedge_targets.backends import tflite

pytest.importorskip("ai_edge_litert")


@pytest.fixture
def matching(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The toolchain's module, whose neighbours lie beside it."""
    monkeypatch.syspath_prepend(str(Path(tflite.__file__).with_name("toolchain")))
    before = set(sys.modules)
    import matching as found  # type: ignore[import-not-found]

    yield found
    for name in set(sys.modules) - before:
        module = sys.modules[name]
        if isinstance(module, ModuleType) and "toolchain" in (getattr(module, "__file__", "") or ""):
            del sys.modules[name]


ONE = np.array([1.0, 0.1, 0.8, -3.0, 3.5])
"""A fingerprint: root mean square, mean, mean magnitude, least, largest."""


@pytest.mark.parametrize(
    ("others", "found"),
    [
        ({"same": 1e-6, "other": 0.5}, ["same"]),
        ({"same": 1e-6, "again": 5e-6, "near": 9e-4}, ["same", "again", "near"]),
        # Behind many approximations the difference is larger; what else has as many numbers is much farther away.
        ({"same": 2e-2, "other": 0.5}, ["same"]),
        ({"same": 2e-2, "again": 2.0001e-2, "other": 0.5}, ["same", "again"]),
        ({"one": 2e-2, "other": 4e-2}, []),
        ({"other": 5e-2}, []),
        ({}, []),
    ],
)
def test_the_nearest_numbers_are_taken_if_no_others_come_close(
    matching: Any, others: dict[str, float], found: list[str]
) -> None:
    away = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
    given = [(name, ONE + distance * away) for name, distance in others.items()]
    assert matching._alike(ONE, given) == found
