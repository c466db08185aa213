"""Running a lowered model on a processor without VNNI: the same Python, emulated as a Haswell by qemu-user.

``python -m tests.support.other_processor REQUEST.json`` is the emulated half."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kedge_targets import registry
from tests.conftest import ROOT

QEMU = "qemu-x86_64"


Samples = npt.NDArray[np.float32]


def on_haswell(backend: str, models: Sequence[tuple[Path, Samples]], folder: Path) -> list[Samples]:
    """The first output of each model (its entry) for each of its samples, as an Intel Haswell computes it."""
    listed = []
    for index, (entry, samples) in enumerate(models):
        given, out = folder / f"samples-{index}.npy", folder / f"haswell-{index}.npy"
        np.save(given, samples)
        listed.append([str(entry), str(given), str(out)])
    request = folder / "haswell.json"
    request.write_text(json.dumps({"backend": backend, "models": listed}))
    # The interpreter itself: qemu follows no "#!" and no link of a virtual environment.
    python = str(Path(sys.executable).resolve())
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *(path for path in sys.path if path)]),
        "ORT_DISABLE_TELEMETRY": "1",
    }
    command = [QEMU, "-cpu", "Haswell", python, "-m", "tests.support.other_processor", str(request)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False)
    if ran.returncode:
        raise RuntimeError(f"emulation failed ({ran.returncode}): {ran.stderr[-2000:]}")
    return [np.load(out) for _, _, out in listed]


def answers(backend: str, entry: Path, samples: Samples) -> Samples:
    """The first output for each sample, one at a time, on one thread."""
    session = registry.runtime(backend).load(entry, {"threads": 1})
    try:
        return np.concatenate([session.run([sample[None]])[0] for sample in samples])
    finally:
        session.close()


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    for entry, samples, out in asked["models"]:
        np.save(out, answers(asked["backend"], Path(entry), np.load(samples)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
