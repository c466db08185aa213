"""What came with TensorRT 10."""

from __future__ import annotations

from typing import Any

import fake_trt as base


class IProgressMonitor:
    def __init__(self) -> None:
        self._initialized = True

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        raise RuntimeError("Tried to call pure virtual function")

    def step_complete(self, phase_name: str, step: int) -> bool:
        raise RuntimeError("Tried to call pure virtual function")

    def phase_finish(self, phase_name: str) -> None:
        raise RuntimeError("Tried to call pure virtual function")


class ParserError(base.ParserError):
    def node_name(self) -> str:
        return self._name


class OnnxParser(base.OnnxParser):
    ERROR = ParserError


class IBuilderConfig(base.IBuilderConfig):
    __slots__ = ("progress_monitor",)

    def __init__(self) -> None:
        super().__init__()
        self.progress_monitor: IProgressMonitor | None = None


class Builder(base.Builder):
    def create_builder_config(self) -> IBuilderConfig:
        return IBuilderConfig()

    def _steps(self, config: Any) -> None:
        monitor = config.progress_monitor
        if monitor is None:
            return
        monitor.phase_start("Building Engine", None, 2)
        for step in range(2):
            monitor.phase_start("Timing Graph Nodes", "Building Engine", 3)
            for inner in range(3):
                if not monitor.step_complete("Timing Graph Nodes", inner):
                    return
            monitor.phase_finish("Timing Graph Nodes")
            monitor.step_complete("Building Engine", step)
        monitor.phase_finish("Building Engine")
