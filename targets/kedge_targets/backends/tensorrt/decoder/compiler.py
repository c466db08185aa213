"""Compiles decoders for ONNX Runtime's CUDA provider: the graph of its fused operators, in float16.

CUDA's GroupQueryAttention takes float16 and bfloat16 alone (contrib_ops/cuda/bert/group_query_attention.cc of ONNX
Runtime), so all of the graph computes in float16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kedge_protocol.bundle.config import RuntimeRequirement, Verified
from kedge_targets.backends.onnxruntime.decoder import compiler
from kedge_targets.backends.tensorrt import fallback
from kedge_targets.decoder import contract


class Compiler(compiler.Compiler):
    """See :class:`kedge_targets.decoder.contract.DecoderCompiler`. Calibration and the float reference run in float32,
    as on other targets."""

    half = True
    windows = False
    cache_itemsize = 2
    verified = Verified.CHECKED
    margin = 2.0
    """Both sides round: a processor between the operators, a GPU within them."""

    def objection(self, kind: str, options: Mapping[str, Any]) -> str:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.objection`."""
        return "" if kind == contract.DECODERS else f"no {kind} are written for CUDA yet"

    def objection_to(self, precision: str, cache: str) -> str:
        """See :meth:`kedge_targets.decoder.contract.DecoderCompiler.objection_to`."""
        if cache != "float32":
            return "keys and values are stored in float16 on CUDA"
        return "layers compute in float16 on CUDA" if precision == "float32" else ""

    def runtimes(self, minimum: str) -> tuple[RuntimeRequirement, ...]:
        """Return the distributions of ONNX Runtime: with CUDA, and without it."""
        return tuple(RuntimeRequirement(distribution=name, minimum=minimum) for name in fallback.DISTRIBUTIONS)
