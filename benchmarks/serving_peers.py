"""Other servers with the same model, in an environment of their own: MLServer, and FastAPI as most people write it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.serving_load import Target, load

_MODEL = """
import numpy as np, onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

class Kws(MLModel):
    async def load(self):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        array = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        name = self.session.get_inputs()[0]
        found = self.session.run(None, {{name.name: array}})[0]
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("scores", found)])
"""
_APP = """
import numpy as np, onnxruntime
from fastapi import FastAPI
from pydantic import BaseModel

class Tensor(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    data: list[float]

class Request(BaseModel):
    inputs: list[Tensor]

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession({path!r}, options, providers=["CPUExecutionProvider"])
name = session.get_inputs()[0].name
app = FastAPI()

@app.get("/v2/health/ready")
def ready():
    return {{}}

@app.post("/v2/models/kws/infer")
def infer(request: Request):
    tensor = request.inputs[0]
    array = np.array(tensor.data, np.float32).reshape(tensor.shape)
    found = session.run(None, {{name: array}})[0]
    return {{"outputs": [{{"name": "scores", "shape": list(found.shape), "data": found.ravel().tolist()}}]}}
"""


class Peer:
    """A server that runs.

    Args:
        name: for the table.
        command: starts it; its port is ``port``.
    """

    def __init__(self, name: str, command: list[str], folder: Path, port: int) -> None:
        self.name = name
        self.port = port
        self._process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ready = Target(port, b"GET /v2/health/ready HTTP/1.1\r\nHost: localhost\r\n\r\n")
        end = time.monotonic() + 120
        while not ready.answers():
            if self._process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not start: {' '.join(command)}")
            time.sleep(0.2)

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def cost(self, clients: int, body: bytes, requests: int) -> float:
        """CPU µs a request."""
        head = "POST /v2/models/kws/infer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        return load(Target(self.port, request), self.pid, clients, requests)

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(30)


def least(model: Path) -> Peer:
    """A server that does nothing but call the bare model."""
    port = _free_port()
    script = Path(__file__).parent / "bare" / "serve.py"
    return Peer(
        "the least server", [sys.executable, str(script), str(port), str(model)], Path(tempfile.gettempdir()), port
    )


def started(model: Path) -> Iterator[Peer]:
    """The peers, running; none where their environment is not named, which is said."""
    python = os.environ.get("KEDGE_BENCH_PEERS")
    if python is None:
        print("skipped: MLServer and FastAPI (KEDGE_BENCH_PEERS names a Python that has them, see the module)")
        return
    folder = Path(tempfile.mkdtemp(prefix="kedge-peers-"))
    ports = [_free_port() for _ in range(4)]
    (folder / "kws.py").write_text(_MODEL.format(path=str(model)))
    (folder / "app.py").write_text(_APP.format(path=str(model)))
    (folder / "model-settings.json").write_text(json.dumps({"name": "kws", "implementation": "kws.Kws"}))
    settings = {"http_port": ports[0], "grpc_port": ports[1], "metrics_port": ports[2], "parallel_workers": 0}
    (folder / "settings.json").write_text(json.dumps({"host": "127.0.0.1", **settings}))
    yield Peer("MLServer", [python, "-m", "mlserver.cli.main", "start", "."], folder, ports[0])
    command = [python, "-m", "uvicorn", "app:app", "--port", str(ports[3]), "--log-level", "warning"]
    yield Peer("FastAPI, uvicorn, onnxruntime", command, folder, ports[3])


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])
