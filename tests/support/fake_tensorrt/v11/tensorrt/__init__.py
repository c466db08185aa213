"""TensorRT 11.4.0.106, as far as Kedge uses it."""

from __future__ import annotations

import enum

import fake_trt as base
import fake_trt_10 as ten
from fake_trt import (
    DataType,
    ICudaEngine,
    IExecutionContext,
    IHostMemory,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    MemoryPoolType,
    init_libnvinfer_plugins,
    nptype,
)
from fake_trt_10 import IBuilderConfig, IProgressMonitor, OnnxParser, ParserError

__version__ = "11.4.0.106"

__all__ = [
    "Builder", "BuilderFlag", "DataType", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "IProgressMonitor", "ITensor", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime", "init_libnvinfer_plugins", "nptype",
]  # fmt: skip


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class BuilderFlag(enum.IntEnum):
    TF32 = 7


class Builder(ten.Builder):
    VERSION = __version__
    STRONGLY_TYPED = -1


class Runtime(base.Runtime):
    VERSION = __version__
