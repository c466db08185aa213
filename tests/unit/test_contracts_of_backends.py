"""What every backend must declare, whichever it is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from kedge_protocol.errors import TargetError
from kedge_targets import registry, target
from kedge_targets.contract import Compiler, Runtime
from kedge_targets.numerics import Granularity, Precision

pytestmark = pytest.mark.device

BACKENDS = registry.names()

HEAVY = (
    "numpy.testing", "onnx", "onnxruntime", "openvino", "nncf", "torch", "tensorflow", "ai_edge_litert",
    "tflite_runtime", "scipy", "sklearn",
)  # fmt: skip


def test_there_are_backends_and_each_target_names_one() -> None:
    assert len(BACKENDS) >= 3
    for name in target.names():
        assert {choice.name for choice in target.find(name).backends} <= set(BACKENDS)


def test_every_backend_serves_a_target() -> None:
    served = {choice.name for name in target.names() for choice in target.find(name).backends}
    assert served == set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_has_both_halves(name: str) -> None:
    assert isinstance(registry.compiler(name), Compiler)
    assert isinstance(registry.runtime(name), Runtime)


@pytest.mark.parametrize("name", BACKENDS)
def test_numerics_are_declared(name: str) -> None:
    numerics = registry.compiler(name).numerics
    # Programmable logic has no floats: its widest integers are what a search falls back to.
    assert {Precision.FLOAT32, Precision.FLOAT16, Precision.W8A8} & set(numerics.precisions)
    assert len(set(numerics.precisions)) == len(numerics.precisions)
    assert set(numerics.layouts) <= {"NCHW", "NHWC"}
    assert numerics.layouts
    assert bool(numerics.schemes) == (Precision.INT8 in numerics.precisions)
    for way in numerics.schemes:
        assert way.activation in ("int8", "uint8")
        assert way.weight in ("int8", "uint8")
        assert isinstance(way.granularity, Granularity)


@pytest.mark.parametrize("name", BACKENDS)
def test_each_target_gets_ways_of_int8_that_are_declared(name: str) -> None:
    compiler = registry.compiler(name)
    for device in (target.find(other) for other in target.names()):
        if name in {choice.name for choice in device.backends}:
            ways = compiler.quantized_for(device)
            assert bool(ways) == (Precision.INT8 in compiler.numerics.precisions)
            assert set(ways) <= set(compiler.numerics.schemes)


@pytest.mark.parametrize("name", BACKENDS)
def test_the_runtime_declares_distributions_and_kernel_sets(name: str) -> None:
    runtime = registry.runtime(name)
    assert runtime.distributions
    assert runtime.kernel_sets
    assert len(set(runtime.kernel_sets)) == len(runtime.kernel_sets)


@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_missing_is_told_with_a_command(name: str) -> None:
    missing = registry.compiler(name).missing()
    assert missing is None or "install" in missing


@pytest.mark.parametrize("name", BACKENDS)
def test_importing_a_backend_imports_no_vendors_package(name: str) -> None:
    script = f"""
import sys
from kedge_targets import registry
compiler, runtime = registry.compiler({name!r}), registry.runtime({name!r})
compiler.numerics, runtime.distributions, runtime.kernel_sets
print([module for module in {HEAVY!r} if module in sys.modules])
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["", "tensor", "onnxruntime.compiler", "../worker"])
def test_an_unknown_backend_is_an_error_that_lists_those_there_are(name: str) -> None:
    with pytest.raises(TargetError, match=", ".join(BACKENDS)):
        registry.compiler(name)
    with pytest.raises(TargetError):
        registry.runtime(name)
