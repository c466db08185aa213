"""Fixtures of the integration tests."""

from __future__ import annotations

import pytest
from tests.support import toolchains

from kedge_targets.toolchain import Toolchain


@pytest.fixture(scope="session")
def tflite_toolchain() -> Toolchain:
    """TFLite's converter; see :func:`tests.support.toolchains.required`."""
    return toolchains.required("tflite")


@pytest.fixture(scope="session")
def ncnn_toolchain() -> Toolchain:
    """pnnx; see :func:`tests.support.toolchains.required`."""
    return toolchains.required("ncnn")


@pytest.fixture(scope="session")
def tensorrt_toolchain() -> Toolchain:
    """NVIDIA's parser and builder; see :func:`tests.support.toolchains.required`."""
    return toolchains.required("tensorrt")
