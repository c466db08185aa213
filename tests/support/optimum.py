"""optimum-onnx in an environment of its own (``.zoo/``): it wants a transformers older than the zoo's, and torch."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from tests.support import foreign

PACKAGES = ("torch==2.13.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnx==1.23.2", "onnxruntime==1.32.0")


def python() -> Path:
    """The environment's Python; made at the first need.

    Raises:
        RuntimeError: the package index does not give the packages.
    """
    made = foreign.folder() / "optimum-onnx-0.1.0"
    with (foreign.folder() / "optimum-onnx.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / ".installed").exists():
            _ran(sys.executable, "-m", "venv", "--clear", str(made))
            _ran(str(made / "bin" / "python"), "-m", "pip", "install", "--quiet", *PACKAGES)
            (made / ".installed").touch()
    return made / "bin" / "python"


def exported(folder: Path, out: Path) -> Path:
    """A decoder's Hugging Face folder as ONNX with past and present, as optimum writes it.

    Raises:
        RuntimeError: it does not.
    """
    cli = "from optimum.commands.optimum_cli import main; main()"
    arguments = ["export", "onnx", "--model", str(folder), "--task", "text-generation-with-past", str(out)]
    _ran(str(python()), "-c", cli, *arguments)
    return out / "model.onnx"


def _ran(*command: str) -> None:
    told = {**os.environ, "HF_HUB_OFFLINE": "1"}
    told.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False, env=told)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])}: {done.stderr.strip()[-800:]}")
