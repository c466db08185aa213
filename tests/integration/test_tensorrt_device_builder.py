"""The device half with NVIDIA's real builder: TensorRT for RTX, which needs no GPU to parse and build."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

from tests.support import nvidia

import kedge_protocol
import kedge_targets
from kedge_targets.toolchain import Toolchain

SCRIPT = """
import json, sys
from pathlib import Path
import tensorrt_rtx_bindings as library
from kedge_protocol.errors import KedgeError
from kedge_targets.backends.tensorrt import api

request = json.loads(sys.stdin.read())
made = api.of(library)
usual = made.watch

def watch(config, tell):
    # No GPU is here to build for: one that this builder knows is named.
    config.num_compute_capabilities = 1
    config.set_compute_capability(library.ComputeCapability.SM86, 0)
    usual(config, tell)

made.watch = watch
told = []
answers = {"line": type(made).__name__, "version": made.version}
for name, order in request.items():
    shapes = {key: tuple(tuple(one) for one in value) for key, value in order.pop("shapes").items()}
    order = {**order, "graph": Path(order["graph"]), "shapes": shapes}
    order["network_flags"], order["builder_flags"] = tuple(order["network_flags"]), tuple(order["builder_flags"])
    try:
        engine = made.build(api.Order(**order), lambda what, done, total: told.append([name, what, done, total]))
        answers[name] = {"bytes": len(engine)}
    except KedgeError as error:
        answers[name] = {"kind": type(error).__name__, "what": error.what, "where": error.where}
try:
    made.deserialize(b"nothing that TensorRT made")
except KedgeError as error:
    answers["deserialize"] = str(error)
answers["told"] = told
print(json.dumps(answers))
"""


def test_real_engines_are_built_through_the_adapter_of_line_11(tensorrt_toolchain: Toolchain, tmp_path: Path) -> None:
    orders = {}
    wrong = nvidia.graphs(batch=1, asymmetric=True)["int8"]
    graphs = {**nvidia.graphs(batch=1), "asymmetric": wrong, "free": nvidia.graphs(batch=None)["int8"]}
    for name, raw in {**graphs, "flags": graphs["fp16"]}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(raw)
        orders[name] = {
            "graph": str(path),
            "network_flags": [],
            "builder_flags": ["FP16"] if name == "flags" else [],
            "workspace_bytes": 64 << 20,
            "shapes": {"input": [[1, 16], [1, 16], [8, 16]]} if name == "free" else {},
        }
    folders = [str(Path(package.__file__).parents[1]) for package in (kedge_targets, kedge_protocol)]
    ran = subprocess.run(
        [tensorrt_toolchain.python, "-c", SCRIPT],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    answers = json.loads(ran.stdout.splitlines()[-1])
    assert answers["line"] == "Api11"
    for name in ("int8", "fp16", "free"):
        assert answers[name]["bytes"] > 1000, answers[name]
    assert answers["asymmetric"]["kind"] in ("UnsupportedOperatorError", "VerificationError")
    assert "quantize_input" in answers["asymmetric"]["where"] + answers["asymmetric"]["what"]
    assert answers["flags"]["kind"] == "VerificationError"
    assert "BuilderFlag.FP16" in answers["flags"]["what"]
    assert "refuses the engine" in answers["deserialize"]
    told = {(name, what) for name, what, _, _ in answers["told"]}
    assert {("int8", "parse"), ("fp16", "parse")} <= told
    assert len([what for name, what in told if name == "int8"]) > 1, "the builder itself tells how far it is"
