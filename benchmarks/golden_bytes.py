"""Bytes of golden vectors: `python -m benchmarks.golden_bytes [MODEL …]`, for ten published models, on generic-cpu.

Before is what was stored until November 2026: sixteen whole samples and their outputs, in float32. The models are those
of ``make zoo`` (wheels fetched into ``.zoo/``) and of the shared data; each is compiled as it is (`precision=float32`),
on eight samples for calibration and 32 for evaluation, which does not matter for the bytes.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tests.support import foreign, own_detector, requirements, shapes, zoo

import kedge
from kedge_protocol import golden
from kedge_protocol.bundle.layout import Layout
from kedge_targets.executor import Executor

Array = npt.NDArray[Any]
Feeds = dict[str, Array]

TARGET = "generic-cpu"
CALIBRATION, EVALUATION = 8, 32
WHOLE = 16
"""Samples that were stored."""
_SILERO = 576


def main(names: list[str]) -> None:
    """Compile each, and print a row for it."""
    with tempfile.TemporaryDirectory(prefix="kedge-bench-") as scratch:
        every = models(Path(scratch))
        print(
            "| model | its files | golden vectors before | now | share of the model | all that a device pulls | how |"
        )
        print("|---|---|---|---|---|---|---|")
        for name in names or every:
            folder = Path(scratch) / name
            folder.mkdir()
            print(row(name, *every[name](), folder), flush=True)


def models(scratch: Path) -> dict[str, Callable[[], tuple[Path, Callable[[int, int], Feeds]]]]:
    """Name → its file, and (how many, seed) → inputs."""
    found: dict[str, Callable[[], tuple[Path, Callable[[int, int], Feeds]]]] = {
        name: lambda make=make: _parts(make()) for name, make in zoo.models(scratch).items()
    }
    found["silero-vad"] = lambda: (foreign.package("silero-vad") / "silero_vad" / "data" / "silero_vad.onnx", _sounds)
    found["own detector"] = lambda: (own_detector.trained(), lambda n, seed: _shapes(own_detector.trained(), n, seed))
    for name in ("ic_resnet8", "kws_dscnn"):
        found[name] = lambda name=name: _shared(name)
    return found


def row(name: str, model: Path, feeds: Callable[[int, int], Feeds], folder: Path) -> str:
    """One line of the table."""
    for role, count, seed in (("c", CALIBRATION, 0), ("e", EVALUATION, 1)):
        np.savez(folder / f"{role}.npz", **feeds(count, seed))
    release = kedge.compile(
        model, name="golden", version="1", targets=[TARGET], calibration=folder / "c.npz", evaluation=folder / "e.npz",
        out=folder / "OUT", quantize="precision=float32", effort="quick", max_drop=1.0,
    )  # fmt: skip
    layout = Layout(release.path)
    bundle = layout.bundle(TARGET)
    files = {title: layout.blob_path(layer.digest) for title, layer in bundle.files.items()}
    now = files.pop(bundle.config.golden.file).stat().st_size
    size = sum(path.stat().st_size for path in files.values())
    before = _whole(files, bundle.config, feeds(WHOLE, 1), folder / "before.npz")
    form = release.report.bundles[0].golden.form if release.report is not None else ""
    return (
        f"| {name} | {_kib(size)} | {_kib(before)} | {_kib(now)} | {now / size:.3f} | "
        f"{(size + before) / size:.2f}× → {(size + now) / size:.2f}× | "
        f"{bundle.config.golden.samples} samples{', ' + form if form else ''} |"
    )


def _whole(files: dict[str, Path], config: Any, feeds: Feeds, path: Path) -> int:
    """Bytes of whole samples with their outputs."""
    place = path.with_suffix("")
    place.mkdir()
    for title, file in files.items():
        (place / title).symlink_to(file.resolve())
    executor = Executor.of(place, config)
    try:
        rows = [executor.on_samples({name: _of(array, at) for name, array in feeds.items()}) for at in range(WHOLE)]
    finally:
        executor.close()
    outputs = {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}
    raw = {name: np.concatenate([_of(array, at) for at in range(WHOLE)]) for name, array in feeds.items()}
    allowed = {name: golden.Tolerance(1.0, 1.0) for name in outputs}
    golden.save(golden.Golden(raw, outputs, allowed), path)
    return path.stat().st_size


def _of(array: Array, at: int) -> Array:
    """One sample; of what is one value for all, that value."""
    return array[at : at + 1] if array.ndim else array.reshape(1)


def _kib(size: int) -> str:
    return f"{size / 1024:.1f} KiB"


def _parts(one: zoo.Foreign) -> tuple[Path, Callable[[int, int], Feeds]]:
    raw = np.float32(one.raw)
    return one.path, lambda n, seed: {k: a if one.raw == 1 else a * raw for k, a in one.feeds(n, seed).items()}


def _shared(name: str) -> tuple[Path, Callable[[int, int], Feeds]]:
    data = requirements.SHARED
    samples = np.load(next((data / "eval").glob(f"{name.partition('_')[0]}*.npz")))
    arrays = {key: samples[key] for key in samples.files if key != "label"}

    def feeds(count: int, seed: int) -> Feeds:
        return {key: array[seed * 50 : seed * 50 + count] for key, array in arrays.items()}

    return data / "models" / f"{name}.onnx", feeds


def _sounds(count: int, seed: int) -> Feeds:
    rng = np.random.default_rng(seed)
    sound = np.cumsum(rng.normal(scale=0.02, size=(count, _SILERO)), axis=1).astype(np.float32)
    return {"input": sound, "sr": np.array(16000), "state": rng.normal(size=(count, 2, 128)).astype(np.float32) * 0.1}


def _shapes(model: Path, count: int, seed: int) -> Feeds:
    pixels, _ = shapes.pictures(count, seed=seed)
    return {"images": np.stack(list(pixels)).astype(np.float32) / 255}


if __name__ == "__main__":
    main(sys.argv[1:])
