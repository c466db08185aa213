"""The serving process: CPU a request against the bare model and against other servers, restarts, hostile clients.

CPU microseconds of the server's whole process tree travel between machines; requests a second do not, and are printed
beside them. ``KEDGE_BENCH_PEERS`` names a Python of an environment with mlserver, fastapi, uvicorn[standard] and
onnxruntime; without it those rows are skipped aloud.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks import calling, serving_peers
from benchmarks.harness import SHARED, Result, medians
from benchmarks.serving_load import Target, cpu_seconds, health_milliseconds, load, wrk_rate

MODELS = {"kws": "kws_dscnn_int8.tflite", "ic": "ic_resnet8_int8.tflite"}
REQUESTS = 2400
ROUNDS = 3
_POLL = 0.25
"""Seconds between two looks at the serving process, as the agent does."""


def run() -> Iterator[Result]:
    """Every row of the serving table."""
    if not (SHARED / "models" / "kws_dscnn_int8.tflite").exists():
        print("skipped: serving (the shared data is absent)")
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        samples = {name: install_sampled(folder, name, file) for name, file in MODELS.items()}
        _install_as_peers_have_it(folder)
        with Server(folder) as server:
            yield from _costs(server, samples["kws"])
            for name in MODELS:
                yield from _binary_costs(server, name, samples[name])
            yield from _hostile(server)
        yield from calling.nearly_empty()
        yield from calling.imports()
        yield from _restarts(folder, samples["kws"])
        yield from _switches(folder)


def install_sampled(folder: Path, name: str, file: str) -> np.ndarray:
    """A model on the state's disk; one sample of it."""
    from tests.support.bundles import make_tflite_bundle
    from tests.support.installed import install

    with np.load(SHARED / "eval" / f"{name}.npz") as data:
        samples = data["input"][:32].astype(np.float32)
    install(folder / "state", make_tflite_bundle(folder, SHARED / "models" / file, samples, name), "rpi4")
    return samples[:1]


def _install_as_peers_have_it(folder: Path) -> None:
    """The float model in ONNX Runtime, which the other servers run; proved, so that threads are as they are best."""
    from tests.support.installed import install

    import kedge
    from kedge_agent.proving import ProofLimits, prove

    with np.load(SHARED / "eval" / "kws.npz") as data:
        np.savez(folder / "few.npz", input=data["input"][:64], label=data["label"][:64])
    kedge.compile(
        SHARED / "models" / "kws_dscnn.onnx", name="same", version="1", targets=["generic-cpu"],
        calibration=folder / "few.npz", evaluation=folder / "few.npz", out=folder / "same",
        quantize="precision=float32", max_drop=1.0,
    )  # fmt: skip
    installed = install(folder / "state", folder / "same")
    slot = installed.current()
    if slot is not None:
        prove(slot.folder, slot.bundle().config, ProofLimits(), installed.cache, lambda line: None)


class Server:
    """A supervised serving process, polled as the agent polls it.

    Args:
        folder: holds the state.
    """

    def __init__(self, folder: Path, **options: float) -> None:
        from kedge_agent.serving.supervisor import ServingSupervisor

        self.supervisor = ServingSupervisor(folder / "state", ["127.0.0.1:0"], **options)
        self.port = int(self.supervisor.listen()[0].getsockname()[1])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def _poll(self) -> None:
        while not self._stop.wait(_POLL):
            self.supervisor.poll(time.monotonic())
        self.supervisor.stop()

    def __enter__(self) -> Server:
        self._thread.start()
        while self.supervisor.pid is None or not Target(self.port, _get("/v2/health/ready")).answers():
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def pid(self) -> int:
        return self.supervisor.pid or 0


def _get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


def post(path: str, body: bytes, more: str = "") -> bytes:
    """A request of JSON."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def json_body(sample: np.ndarray) -> bytes:
    """A request with one tensor as JSON."""
    tensor = {"name": "input", "datatype": "FP32", "shape": list(sample.shape), "data": sample.ravel().tolist()}
    return json.dumps({"inputs": [tensor]}).encode()


def binary_request(name: str, sample: np.ndarray) -> bytes:
    tensor = {"name": "input", "datatype": "FP32", "shape": list(sample.shape)}
    tensor["parameters"] = {"binary_data_size": sample.nbytes}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return post(
        f"/v2/models/{name}/infer", head + sample.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n"
    )


def _costs(server: Server, sample: np.ndarray) -> Iterator[Result]:
    """CPU of a request, in turns with the bare model's and with other servers, which run the float model."""
    alone = bare("kws", sample)
    body = json_body(sample)
    ours = {name: Target(server.port, post(f"/v2/models/{name}/infer", body)) for name in ("kws", "same")}
    peers = list(serving_peers.started(SHARED / "models" / "kws_dscnn.onnx"))
    try:
        for clients in (4, 16):
            columns = [alone]
            columns += [lambda one=one, n=clients: load(one, server.pid, n, REQUESTS) for one in ours.values()]
            columns += [lambda peer=peer, n=clients: peer.cost(n, body, REQUESTS // 4) for peer in peers]
            model, int8, same, *theirs = medians(ROUNDS, *columns)
            what = f"HTTP JSON, kws, {clients} clients"
            yield _row(what, int8, model, "the bare model", "≤ +300 µs", int8 <= model + 300)
            for peer, cost in zip(peers, theirs, strict=True):
                share = 6 if peer.name.startswith("MLServer") else 3
                yield _row(what, int8, cost, peer.name, f"≤1/{share}", int8 <= cost / share)
                yield _row(f"{what}, the peer's own float model", same, cost, peer.name, "shown", True)
    finally:
        for peer in peers:
            peer.stop()
    for clients in (1, 4, 16):
        rate = wrk_rate(server.port, "/v2/models/kws/infer", body, clients)
        if rate is not None:
            print(f"wrk, {clients} clients: {rate:.0f} requests a second")


def _binary_costs(server: Server, name: str, sample: np.ndarray) -> Iterator[Result]:
    """CPU of a request with binary tensors, in turns with the bare model's and with the least server that calls it."""
    request = binary_request(name, sample)
    target = Target(server.port, request)
    alone = bare(name, sample)
    least = serving_peers.least(SHARED / "models" / MODELS[name])
    try:
        for clients in (1, 4):
            model, floor, ours = medians(
                ROUNDS,
                alone,
                lambda clients=clients: load(Target(least.port, request), least.pid, clients, REQUESTS),
                lambda clients=clients: load(target, server.pid, clients, REQUESTS),
            )
            what = f"binary tensors, {name}, {clients} client{'s' * (clients > 1)}"
            yield _row(what, ours, model, "the bare model", "≤1.3×", ours <= 1.3 * model)
            yield _row(what, ours, floor, "the least server in Python that calls it", "shown", True)
    finally:
        least.stop()


def _row(name: str, ours: float, theirs: float, against: str, goal: str, met: bool) -> Result:
    return Result(name, f"CPU a request, median of {ROUNDS} times {REQUESTS}", "µs", ours, theirs, against, goal, met)


def bare_call(name: str, sample: np.ndarray) -> Callable[[], object]:
    """A call of LiteRT alone, quantization in numpy included."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(SHARED / "models" / MODELS[name]), num_threads=1)
    interpreter.allocate_tensors()
    given, made = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    scale, zero = given["quantization"]

    def call() -> object:
        values = np.clip(np.rint(sample / np.float32(scale)) + zero, -128, 127).astype(np.int8)
        interpreter.set_tensor(given["index"], values.reshape(given["shape"]))
        interpreter.invoke()
        return interpreter.get_tensor(made["index"])

    return call


def bare(name: str, sample: np.ndarray) -> Callable[[], float]:
    """CPU µs of :func:`bare_call`, in a loop."""
    call = bare_call(name, sample)

    def measure() -> float:
        began = time.process_time()
        for _ in range(REQUESTS):
            call()
        return (time.process_time() - began) / REQUESTS * 1e6

    return measure


def _hostile(server: Server) -> Iterator[Result]:
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(200)]
    for link in slow:
        link.sendall(b"POST /v2/models/kws/infer HTTP/1.1\r\nHost: lo")
    worst = health_milliseconds(server.port, 50)
    for link in slow:
        link.close()
    yield Result(
        "health beside 200 clients that send half a head", "worst of 50, new connections", "ms", worst, None, "",
        "<50 ms", worst < 50,
    )  # fmt: skip
    before = _memory(server.pid, "VmRSS")
    Path(f"/proc/{server.pid}/clear_refs").write_text("5")
    body = b'{"inputs":[' + b"{}," * 5_000_000 + b"{}]}"
    Target(server.port, post("/v2/models/kws/infer", body)).answers()
    time.sleep(2.5)  # memory is given back once a second
    peak = _memory(server.pid, "VmHWM") - before
    allowed = 3 * len(body) / 2**20 + 10
    yield Result(
        "15 MB of `{},`", "peak of resident memory over the base", "MiB", peak, None, "", f"≤{allowed:.0f} MiB",
        peak <= allowed,
    )  # fmt: skip
    left = _memory(server.pid, "VmRSS") - before
    yield Result("after it", "resident memory over the base", "MiB", left, None, "", "≤5 MiB", left <= 5)


def _memory(pid: int, name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def _restarts(folder: Path, sample: np.ndarray) -> Iterator[Result]:
    ask = post("/v2/models/kws/infer", json_body(sample))
    with Server(folder, silence_seconds=2.0) as server:
        target = Target(server.port, ask)
        times, work = {}, []
        for number in (signal.SIGKILL, signal.SIGSTOP):
            taken = []
            for _ in range(3):
                time.sleep(2.5)  # it has served for a while, as in life
                os.kill(server.pid, number)
                began = time.monotonic()
                while not target.answers():
                    time.sleep(0.02)
                taken.append(time.monotonic() - began)
                work.append(cpu_seconds(server.pid))
            times[number] = sorted(taken)[1]
    killed, stopped = times[signal.SIGKILL], times[signal.SIGSTOP]
    needed = sorted(work)[len(work) // 2]
    yield Result(
        "CPU of a new process until its first good answer", f"median of {len(work)}", "s", needed, None, "",
        f"≤1.5 s - {_POLL:g} s between two looks", needed <= 1.5 - _POLL,
    )  # fmt: skip
    yield Result("killed → next good answer", "median of 3", "s", killed, None, "", "≤1.5 s", killed <= 1.5)
    yield Result(
        "stopped → next good answer", "median of 3; silence of 2 s is its deadline", "s", stopped, None, "",
        "≤ deadline + 2.5 s", stopped <= 4.5,
    )  # fmt: skip


def _switches(folder: Path) -> Iterator[Result]:
    """Answers whose version label is another bundle's, over switches under load (each bundle has its own answers)."""
    from tests.support.bundles import make_bundle, samples
    from tests.support.installed import install

    from kedge_agent import Model

    state = folder / "switched" / "state"
    releases = [make_bundle(folder, version=f"{number}.0", seed=number) for number in range(2)]
    sample = samples(1)
    expected = {f"{n}.0": Model(path, target="generic-cpu")(sample).ravel() for n, path in enumerate(releases)}
    install(state, releases[0])
    wrong, count, stop = [], [0], threading.Event()

    def work() -> None:
        target = Target(server.port, post("/v2/models/tiny/infer", json_body(sample)))
        while not stop.is_set():
            answer = json.loads(target.ask().partition(b"\r\n\r\n")[2])
            found = np.float32(answer.get("outputs", [{"data": []}])[0]["data"])
            count[0] += 1
            if not np.array_equal(found, expected.get(answer.get("model_version", ""), [])):
                wrong.append(answer)

    switches = int(os.environ.get("KEDGE_BENCH_SWITCHES", "50"))
    with Server(state.parent) as server:
        clients = [threading.Thread(target=work) for _ in range(8)]
        for client in clients:
            client.start()
        for number in range(switches):
            install(state, releases[(number + 1) % 2])
            time.sleep(0.3)
        stop.set()
        for client in clients:
            client.join()
    yield Result(
        f"{switches} switches under 8 clients", f"of {count[0]} answers: failed, mixed or mislabelled", "",
        len(wrong), None, "", "0", not wrong,
    )  # fmt: skip
