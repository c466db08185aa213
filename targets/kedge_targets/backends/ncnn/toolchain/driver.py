"""Converts ONNX to ncnn's files by the program pnnx: standard library and pnnx only, never Kedge.

Speaks the worker's protocol (docs/architecture.md). Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``convert``
    ``{"graph", "shapes", "half", "param", "weights"}`` → ``{"inputs", "outputs", "layers"}``. ``graph`` is an ONNX
    file, ``shapes`` are its inputs' shapes, the batch of 1 among them, ``half`` says whether weights are stored in
    float16, ``param`` and ``weights`` are the files to write; the answer has the names of inputs and outputs in the
    file, and the kind and name of each layer.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))

import driver_loop
from driver_loop import RefusedError

_SECONDS = 900
_LONGEST = 240


def version(request):
    """Find the program and return its version."""
    _program()
    return driver_loop.versions(("pnnx",))


def _program():
    # Importing the package would import torch, which the program does not need.
    found = importlib.util.find_spec("pnnx")
    program = Path(found.origin).parent / "pnnx"
    if not os.access(program, os.X_OK):
        raise RefusedError("ToolchainError", "the program pnnx is not in its package", where=str(program))
    return program


def convert(request):
    """Convert a graph."""
    shapes = ",".join(f"[{','.join(str(size) for size in shape)}]f32" for shape in request["shapes"])
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(request["graph"], Path(folder, "model.onnx"))
        command = [str(_program()), "model.onnx", f"inputshape={shapes}", f"fp16={int(request['half'])}"]
        ran = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
        sys.stderr.write(ran.stdout + ran.stderr)
        param, weights = Path(folder, "model.ncnn.param"), Path(folder, "model.ncnn.bin")
        if ran.returncode or not param.is_file() or not weights.is_file():
            lines = [line.strip() for line in (ran.stdout + ran.stderr).splitlines() if line.strip()]
            raise RefusedError(
                "LoweringError", f"pnnx cannot convert the graph: {(lines or ['no reason'])[-1][:_LONGEST]}"
            )
        text = param.read_text(encoding="utf-8")
        shutil.copyfile(param, request["param"])
        shutil.copyfile(weights, request["weights"])
    layers = [line.split()[:2] for line in text.splitlines()[2:] if line.strip()]
    blobs = sorted(
        {word for line in text.splitlines()[2:] for word in line.split()[4:] if "=" not in word}, key=_number
    )
    return {
        "inputs": [name for name in blobs if name.startswith("in")],
        "outputs": [name for name in blobs if name.startswith("out")],
        "layers": layers,
    }


def _number(name):
    digits = "".join(letter for letter in name if letter.isdigit())
    return int(digits or 0), name


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver_loop.serve(answers, {"version": version, "convert": convert})


if __name__ == "__main__":
    main()
