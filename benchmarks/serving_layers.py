"""Where the CPU time of a request goes: servers that do one thing more each, in turns, under the same load.

``python -m benchmarks.serving_layers`` prints the microseconds of each step, for JSON and for binary tensors. All
servers are one process with a port for each; the first only sends back what it has received, over the same event loop.
Beside them stands the same echo that calls the bare model each time: between two requests the caches are not the
model's, as they are when it is called in a loop.
"""

from __future__ import annotations

import functools
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.harness import SHARED, medians
from benchmarks.serving_load import Target, load

if TYPE_CHECKING:
    from kedge_agent.serving.handler import Job, Request, Response

STEPS = (
    "the event loop and an echo of the bytes",
    "HTTP: the head, the rules of access, the answer's head",
    "a job in a queue with a deadline, looked after",
    "the model is found, the tensor is read",
    "the model is called, counted; its answer is written",
)
CLIENTS, REQUESTS, ROUNDS = 4, 2400, 7
MODEL = "kws"


def main() -> None:
    """Serve in a child process, and measure each of its ports."""
    from benchmarks.serving import bare, binary_request, install_sampled, json_body, post

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sample = install_sampled(folder, MODEL, f"{MODEL}_dscnn_int8.tflite")
        alone = bare(MODEL, sample)
        ways = {
            "JSON": post(f"/v2/models/{MODEL}/infer", json_body(sample)),
            "binary tensors": binary_request(MODEL, sample),
        }
        for name, request in ways.items():
            child = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving_layers", str(folder / "state")],
                stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            try:
                ports = (child.stdout.readline() if child.stdout else "").split()
                targets = [Target(int(port), request) for port in ports]
                costs = [functools.partial(load, target, child.pid, CLIENTS, REQUESTS) for target in targets]
                _print(name, *medians(ROUNDS, alone, *costs))
            finally:
                child.kill()
                child.wait()


def _print(name: str, model: float, called: float, *layers: float) -> None:
    busy = os.getloadavg()[0]
    print(f"{name}, {CLIENTS} clients, CPU µs a request, median of {ROUNDS} times {REQUESTS}; load {busy:.0f}")
    for step, before, cost in zip(STEPS, [0.0, *layers], layers, strict=False):
        print(f"  {cost - before:6.1f}  {step}")
    print(f"  {layers[-1]:6.1f}  in all")
    print(f"  {model:6.1f}  the bare model in a loop; {called - layers[0]:.1f} in the echo, {called:.1f} with it")


class _Layer:
    """A handler that goes so far and answers with what was prepared."""

    def __init__(self, far: int, prepared: Response, state: Path) -> None:
        from kedge_agent.serving.model_pool import ServedModels
        from kedge_agent.serving.open_inference import InferenceHandler
        from kedge_agent.serving.worker_pool import WorkerPool

        models = ServedModels(state, workers=lambda name: WorkerPool(name, in_loop=True))
        models.scan()
        self._whole = InferenceHandler(models)
        self._pool = WorkerPool(MODEL, in_loop=True)
        self._far = far
        self._prepared = prepared

    def methods(self, path: str) -> Sequence[str]:
        return self._whole.methods(path)

    def route(self, request: Request) -> Response | Job:
        from kedge_agent.serving.handler import Job

        if self._far == 1:
            return self._prepared
        if self._far == 2:
            return Job(self._pool, lambda: self._prepared)
        if self._far == 3:
            return Job(self._pool, lambda: self._read(request))
        return self._whole.route(request)

    def _read(self, request: Request) -> Response:
        from kedge_agent.serving import infer_request

        _, loaded = self._whole.find(MODEL, None)
        header = request.fields.get("inference-header-content-length")
        infer_request.from_json(request.body, header, loaded.bundle.config)
        return self._prepared


def _serve(state: Path) -> None:
    """Serve each layer in a thread of its own, and print their ports."""
    from kedge_agent.serving.handler import Response
    from kedge_agent.serving.http_server import HttpServer
    from kedge_agent.serving.settings import ServerSettings, listening_socket

    sys.setswitchinterval(0.0005)
    prepared = Response(200, b'{"model_name":"kws","model_version":"1.0","outputs":[]}')
    ports = [_echo(_bare_call()), _echo(lambda: None)]
    for far in range(1, len(STEPS)):
        listening = listening_socket("127.0.0.1:0")
        server = HttpServer([listening], [("/v2", _Layer(far, prepared, state))], ServerSettings())
        threading.Thread(target=server.run, daemon=True).start()
        ports.append(int(listening.getsockname()[1]))
    print(*ports, flush=True)
    while os.getppid() != 1:
        time.sleep(1)


def _bare_call() -> Callable[[], object]:
    """The bare model on its own first sample."""
    from benchmarks.serving import bare_call

    with np.load(SHARED / "eval" / f"{MODEL}.npz") as data:
        return bare_call(MODEL, data["input"][:1].astype(np.float32))


def _echo(work: Callable[[], object]) -> int:
    """Do some work for each request and answer it with its own bytes, over Kedge's event loop; return the port."""
    from kedge_agent.serving.event_loop import READ, EventLoop

    loop = EventLoop(lambda now: None)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    buffer = memoryview(bytearray(1 << 18))

    def accept(_: int) -> None:
        link, _ = listening.accept()
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def answer(_: int) -> None:
            size = link.recv_into(buffer)
            if size:
                work()
                link.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (size, buffer[:size]))
            else:
                loop.forget(link.fileno())
                link.close()

        loop.watch(link.fileno(), READ, answer)

    loop.watch(listening.fileno(), READ, accept)
    threading.Thread(target=loop.run, daemon=True).start()
    return int(listening.getsockname()[1])


if __name__ == "__main__":
    _serve(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
