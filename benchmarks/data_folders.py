"""Memory of reading 20 000 pictures from class folders: `python -m benchmarks.data_folders [COUNT]`. The pictures are
drawn; the peak is of a process that does nothing else, beside one that reads a hundredth of them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

COUNT = 20_000
SIZE = 96
_CHILD = """
import resource, sys
from kedge.importing.data_folders.converting import ConvertRequest, convert
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline import declaration, settling
from kedge_protocol.bundle.pipeline import Task
inputs = (TensorInfo(name="x", shape=(None, 3, 96, 96), dtype="float32", layout="NCHW"),)
outputs = (TensorInfo(name="y", shape=(None, 10), dtype="float32"),)
pipeline = settling.settled(declaration.READY[Task.CLASSIFICATION], inputs, outputs, where="--task")
made = convert(ConvertRequest(path=sys.argv[1], role="evaluation", pipeline=pipeline, inputs=inputs, folder=sys.argv[2],
                              most=int(sys.argv[3])), lambda *_: None)
usage = resource.getrusage(resource.RUSAGE_SELF)
print(made.samples, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime)
"""


def draw(folder: Path, count: int) -> None:
    """JPEG files of 10 classes."""
    from PIL import Image

    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (64, 160, 160, 3)).astype(np.uint8)
    for number in range(count):
        place = folder / f"class-{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        left, top = rng.integers(0, 32, 2)
        Image.fromarray(base[number % 64, top : top + 128, left : left + 128]).save(place / f"{number}.jpg", quality=60)


def main(count: int = COUNT) -> None:
    """Draw, read, print."""
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as scratch:
        data = Path(scratch) / "data"
        draw(data, count)
        for most in (count // 100, count):
            out = Path(scratch) / f"out-{most}"
            out.mkdir()
            began = time.perf_counter()
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, str(data), str(out), str(most)],
                check=True, capture_output=True, text=True,
            )  # fmt: skip
            samples, peak, cpu = done.stdout.split()
            seconds = time.perf_counter() - began
            print(f"{samples} pictures: peak {float(peak):.0f} MiB, CPU {float(cpu):.1f} s, wall {seconds:.1f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
