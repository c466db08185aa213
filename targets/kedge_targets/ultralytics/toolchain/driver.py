"""Exports checkpoints of Ultralytics' YOLO to ONNX: standard library and the packages of the lock only, never Kedge.

Speaks the worker's protocol (docs/architecture.md). Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``read``
    ``{"model", "graph"}`` → ``{"notes", "packages"}``. ``model`` is a checkpoint, which is unpickled; ``graph`` is the
    ONNX file to write. The graph and the network are run on the same noise, and must agree.
"""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "toolchain" / "driver_side"))

import driver_loop
from driver_loop import RefusedError

_PACKAGES = ("ultralytics", "torch", "onnx")
_APART = 1e-3
"""Largest difference of graph and network, of the largest answer: float32, in another order."""
_OPSET = 17


def version(request):
    """Return the versions of the packages."""
    return driver_loop.versions(_PACKAGES)


def read(request):
    """Export a checkpoint."""
    # Without a network, whatever the user's settings say.
    os.environ.update(YOLO_OFFLINE="true", YOLO_AUTOINSTALL="false", YOLO_VERBOSE="false")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["YOLO_CONFIG_DIR"] = folder
        copy = Path(folder, "model.pt")
        shutil.copyfile(request["model"], copy)
        with contextlib.redirect_stdout(sys.stderr):
            return _read(copy, request)


def _read(path, request):
    from ultralytics import YOLO, settings

    settings.update({"sync": False})
    try:
        model = YOLO(str(path))
    except Exception as error:
        raise RefusedError(
            "ModelError", f"Ultralytics cannot read it: {_line(error)}", where=request["model"]
        ) from error
    size = model.overrides.get("imgsz") or model.model.args.get("imgsz") or 640
    try:
        made = model.export(format="onnx", imgsz=size, opset=_OPSET, simplify=False, dynamic=False, device="cpu")
    except Exception as error:
        raise RefusedError(
            "ModelError", f"Ultralytics cannot export it: {_line(error)}", where=request["model"]
        ) from error
    _compare(path, Path(made), request["model"])
    shutil.copyfile(made, request["graph"])
    notes = [f"task {model.task}, {len(model.names)} classes, pictures of {size}"]
    return {"notes": notes, "packages": driver_loop.versions(_PACKAGES)["packages"]}


def _compare(checkpoint, graph, where):
    """Run the network, read once more, and the graph on the same noise."""
    import numpy
    import onnxruntime
    import torch
    from ultralytics import YOLO

    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    noise = numpy.random.default_rng(0).random(entry.shape, dtype=numpy.float32)
    answer = session.run(None, {entry.name: noise})[0]
    network = YOLO(str(checkpoint)).model.float().eval()
    for module in network.modules():
        if hasattr(module, "export"):
            module.export = True
    with torch.no_grad():
        expected = network(torch.from_numpy(noise))
    while isinstance(expected, (list, tuple)):
        expected = expected[0]
    expected = expected.numpy()
    if answer.shape != expected.shape:
        raise RefusedError("ModelError", f"the graph answers {answer.shape}, the network {expected.shape}", where=where)
    apart = float(abs(answer - expected).max() / max(1e-6, abs(expected).max()))
    if apart > _APART:
        raise RefusedError("ModelError", f"graph and network differ by {apart:.2g}", where=where)


def _line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver_loop.serve(answers, {"version": version, "read": read})


if __name__ == "__main__":
    main()
