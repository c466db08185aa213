"""Proves bundles by the device's own runtimes, in an emulated process: standard library and the runtimes only. The code
that runs on a device comes from the folders that a request names, as it is there and not from this environment.

Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``prove``
    ``{"paths", "folder", "config", "inputs", "outputs", "seconds"}`` → ``{"holds", "reason", "vectors", "runtime",
    "runtime_version", "machine", "samples"}``. ``paths`` are the folders to import from, ``folder`` holds the bundle's
    files by title, ``config`` is its configuration; ``inputs`` has for each input an ``.npy`` of further samples, which
    are run one by one for at most ``seconds``; the outputs of those that ran are saved under ``outputs`` by name.
"""

import importlib
import importlib.metadata
import platform
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "toolchain" / "driver_side"))

import driver_loop


def version(request):
    """Return the versions of all that is installed; the numbers' own library must load."""
    import numpy  # noqa: F401

    return driver_loop.versions(sorted(one.metadata["Name"] for one in importlib.metadata.distributions()))


def prove(request):
    """Run the golden vectors, then further samples."""
    sys.path.extend(path for path in request["paths"] if path not in sys.path)
    proof = importlib.import_module("kedge_targets.proof")
    asked = proof.ProveRequest(folder=request["folder"], config=request["config"])
    answer = proof.prove(asked, lambda *_: None)
    return {
        "holds": answer.holds,
        "reason": answer.reason,
        "vectors": answer.samples,
        "runtime": answer.runtime,
        "runtime_version": answer.runtime_version,
        "machine": platform.machine(),
        "samples": _further(request) if answer.holds and request["inputs"] else 0,
    }


def _further(request):
    """Run the further samples, and return how many ran."""
    import numpy

    layout = importlib.import_module("kedge_protocol.bundle.layout")
    config = layout.parse_config(Path(request["config"]).read_bytes(), where=request["config"])
    executor = importlib.import_module("kedge_targets.executor").Executor.of(Path(request["folder"]), config)
    arrays = {name: numpy.load(path, mmap_mode="r") for name, path in request["inputs"].items()}
    found = {name: [] for name in request["outputs"]}
    count, end = 0, time.monotonic() + request["seconds"]
    try:
        for row in range(len(next(iter(arrays.values())))):
            if time.monotonic() > end:
                break
            answers = executor.on_samples({name: numpy.array(array[row : row + 1]) for name, array in arrays.items()})
            for name, rows in found.items():
                rows.append(answers[name])
            count += 1
    finally:
        executor.close()
    for name, path in request["outputs"].items():
        if count:
            numpy.save(path, numpy.concatenate(found[name]))
    return count


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver_loop.serve(answers, {"version": version, "prove": prove})


if __name__ == "__main__":
    main()
