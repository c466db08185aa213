"""The packed generic-cpu bundle proves itself on a processor without VNNI (an emulated Haswell)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.compiling import shared_release, unpacked
from tests.support.other_processor import QEMU

ROOT = Path(__file__).resolve().parent.parent.parent

PROVE = """
import json, sys
from kedge_targets.proof import ProveRequest, prove
for folder in sys.argv[1:]:
    answer = prove(ProveRequest(folder=folder, config=folder + "/config.json"), lambda *_: None)
    print(json.dumps({"holds": answer.holds, "reason": answer.reason, "samples": answer.samples}))
"""


@pytest.mark.shared_data
@pytest.mark.needs(QEMU)
def test_healthy_bundles_pass_their_golden_vectors_on_a_haswell(shared_data: Path, tmp_path: Path) -> None:
    folders = [
        str(unpacked(shared_release(shared_data, short), "generic-cpu", tmp_path / short)) for short in ("ic", "kws")
    ]
    python = str(Path(sys.executable).resolve())  # qemu follows no link of a virtual environment
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    ran = subprocess.run(
        [QEMU, "-cpu", "Haswell", python, "-c", PROVE, *folders],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert [answer["holds"] for answer in answers] == [True, True], answers
    assert all(answer["samples"] >= 8 for answer in answers)
