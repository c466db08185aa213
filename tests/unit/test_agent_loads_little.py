"""The resident process stays small: what it loads at its start, and how much memory that takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.device

HEAVY = {
    "numpy", "onnx", "onnxruntime", "openvino", "ai_edge_litert", "tflite_runtime", "tensorflow", "torch", "nncf",
    "kedge", "cryptography", "sqlalchemy", "amqtt", "rich", "jinja2", "matplotlib", "asyncio", "multiprocessing",
    "packaging", "pkg_resources", "yaml", "requests",
}  # fmt: skip
LIGHT_TARGETS = {
    "kedge_targets", "kedge_targets.backend_packages", "kedge_targets.jetson", "kedge_targets.target",
    "kedge_targets.worker",
    "kedge_targets.worker.bootstrap", "kedge_targets.worker.environment", "kedge_targets.worker.process_group",
    "kedge_targets.worker.parent",
    "kedge_targets.worker.progress",
}  # fmt: skip

SCRIPT = """
import json, sys
import kedge_agent.cli, kedge_agent.config, kedge_agent.daemon
import kedge_targets.target
kedge_targets.target.find("rpi4")
print(json.dumps(sorted(sys.modules)))
"""


def loaded(script: str) -> set[str]:
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    return set(json.loads(out))


def test_the_resident_process_loads_no_numpy_no_runtime_and_no_host() -> None:
    modules = loaded(SCRIPT)
    assert not {name.partition(".")[0] for name in modules} & HEAVY
    assert {name for name in modules if name.split(".")[0] == "kedge_targets"} <= LIGHT_TARGETS


def test_what_the_thread_of_the_golden_vectors_adds_is_light_too() -> None:
    modules = loaded(
        "import json, sys\nimport kedge_agent.daemon, kedge_targets.worker, kedge_targets.proof\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not {name.partition(".")[0] for name in modules} & HEAVY


def test_importing_model_loads_neither_numpy_nor_the_format_of_bundles() -> None:
    modules = loaded("import json, sys\nfrom kedge_agent import Model\nprint(json.dumps(sorted(sys.modules)))")
    assert not {name.partition(".")[0] for name in modules} & (HEAVY | {"kedge_targets"})
    assert not {name for name in modules if name.startswith("kedge_protocol.bundle")}


def test_a_serving_process_without_a_language_model_loads_nothing_for_one() -> None:
    modules = loaded(
        "import json, sys, pathlib, tempfile\n"
        "from kedge_agent.serving.child_process import ServingProcess\n"
        "from kedge_agent.serving.settings import ServerSettings\n"
        "ServingProcess(pathlib.Path(tempfile.mkdtemp()), [], ServerSettings())\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    assert not {name for name in modules if name.startswith(("asyncio", "kedge_agent.generation"))}
