"""TensorRT 8.6.1, as far as Kedge uses it."""

from __future__ import annotations

import enum

import fake_trt as base
from fake_trt import (
    DataType,
    IBuilderConfig,
    ICudaEngine,
    IExecutionContext,
    IHostMemory,
    ILogger,
    INetworkDefinition,
    IOptimizationProfile,
    ITensor,
    MemoryPoolType,
    ParserError,
    init_libnvinfer_plugins,
    nptype,
)

__version__ = "8.6.1"

__all__ = [
    "Builder", "BuilderFlag", "DataType", "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory",
    "ILogger", "INetworkDefinition", "IOptimizationProfile", "ITensor", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "ParserError", "Runtime", "init_libnvinfer_plugins", "nptype",
]  # fmt: skip


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0


class BuilderFlag(enum.IntEnum):
    FP16 = 0
    INT8 = 1


class OnnxParser(base.OnnxParser):
    INT8_WEIGHTS = False
    EXPLICIT_BATCH = 1 << NetworkDefinitionCreationFlag.EXPLICIT_BATCH


class Builder(base.Builder):
    VERSION = __version__


class Runtime(base.Runtime):
    VERSION = __version__
