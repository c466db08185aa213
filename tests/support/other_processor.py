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


def on_haswell(
    backend: str, entries: Sequence[tuple[Path, dict[str, object]]], samples: npt.NDArray[np.float32], folder: Path
) -> list[npt.NDArray[np.float32]]:
    """The first output of each model (entry, runtime options) for each sample, as an Intel Haswell computes it."""
    np.save(folder / "samples.npy", samples)
    request = folder / "haswell.json"
    outputs = [str(folder / f"haswell-{index}.npy") for index in range(len(entries))]
    request.write_text(
        json.dumps(
            {
                "backend": backend,
                "samples": str(folder / "samples.npy"),
                "models": [[str(entry), options, out] for (entry, options), out in zip(entries, outputs, strict=True)],
            }
        )
    )
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
    return [np.load(out) for out in outputs]


def answers(
    backend: str, entry: Path, options: dict[str, object], samples: npt.NDArray[np.float32]
) -> npt.NDArray[np.float32]:
    """The first output for each sample, one at a time."""
    session = registry.runtime(backend).load(entry, options)
    try:
        return np.concatenate([session.run([sample[None]])[0] for sample in samples])
    finally:
        session.close()


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    samples = np.load(asked["samples"])
    for entry, options, out in asked["models"]:
        np.save(out, answers(asked["backend"], Path(entry), options, samples))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
