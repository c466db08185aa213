"""Float is taken where integers keep the budget on the samples that the search sees, and not on those held back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import kedge
from kedge.evaluation import resampling
from kedge.search import held_back


def test_float_is_tried_before_a_search_gives_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 1, (16, 8)).astype(np.float32)
    hidden = rng.normal(0, 1, (8, 4)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "v"], ["y"]),
    ]
    shapes = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", k]) for n, k in (("x", 16), ("y", 4))]
    constants = [numpy_helper.from_array(one, name) for name, one in (("w", weights), ("v", hidden))]
    graph = helper.make_graph(nodes, "g", shapes[:1], shapes[1:], constants)
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])
    onnx.save(model, tmp_path / "m.onnx")
    count = held_back.PLENTY
    seen = rng.uniform(-1, 1, (count, 16)).astype(np.float32)
    # Values that calibration does not know, in all samples that are held back.
    fresh = seen.copy()
    fresh[resampling.folds(count)[-1]] *= 8
    label = np.tanh(fresh @ weights) @ hidden
    np.savez(tmp_path / "calibration.npz", x=seen[:200])
    np.savez(tmp_path / "evaluation.npz", x=fresh, label=label)

    def compiled(out: str, max_drop: float, quantize: str | None = None) -> kedge.Release:
        return kedge.compile(
            tmp_path / "m.onnx",
            name="luck",
            version="1.0",
            targets=["generic-cpu"],
            calibration=tmp_path / "calibration.npz",
            evaluation=tmp_path / "evaluation.npz",
            metric="mae",
            max_drop=max_drop,
            quantize=quantize,
            out=tmp_path / out,
        )

    report = compiled("chosen", 0.05).report
    (bundle,) = report.bundles
    said = [one.reason for one in bundle.attempts]
    assert any("on samples that the choice did not see" in reason for reason in said), said
    assert bundle.precision in ("float16", "float32")
