"""NVIDIA's tritonclient, unmodified and with its defaults, against the server: http, grpc and their asyncio forms."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import CLASSES, make_bundle, samples
from tests.support.installed import install
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge_agent import Model
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.serving.settings import ServerSettings
from kedge_agent.slots import ModelFolder
from kedge_targets.calls import plan as plans
from kedge_targets.calls.plan import CallPlan, Gathered

pytest.importorskip("tritonclient", reason="pip install --no-deps -r constraints/proofs.txt")

LABELS = ("a", "b", "c", "d")


class Server:
    """``kedge-agent serve`` with gRPC."""

    def __init__(self, folder: Path) -> None:
        release = make_bundle(folder, version="1.5", labels=LABELS)
        self.expected = Model(release, target="generic-cpu")(samples(2))
        self.grpc = f"127.0.0.1:{free_port()}"
        command = [sys.executable, "-u", "-m", "kedge_agent.cli", "serve", str(release), "--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen([*command, "--grpc", self.grpc], stdout=subprocess.PIPE, text=True)
        output = self.process.stdout
        assert output is not None
        found = None
        while found is None:
            line = output.readline()
            assert line
            found = re.search(r"http://(127.0.0.1:\d+)", line)
        self.http = found[1]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("triton"))
    try:
        yield one
        one.process.terminate()
        assert one.process.wait(60) == 0
    finally:
        one.process.kill()
        one.process.wait()


def client_of(kind: str, server: Server) -> tuple[Any, Any]:
    """The client's module and a client."""
    if kind == "http":
        import tritonclient.http as module

        return module, module.InferenceServerClient(server.http)
    import tritonclient.grpc as module

    return module, module.InferenceServerClient(server.grpc)


def plain(message: Any) -> Any:
    """A message of gRPC, or what http's client has read, as a dictionary."""
    if isinstance(message, (dict, list)):
        return message
    from google.protobuf.json_format import MessageToDict

    return MessageToDict(message, preserving_proto_field_name=True)


def given(module: Any, array: np.ndarray[Any, Any]) -> list[Any]:
    tensor = module.InferInput("input", list(array.shape), "FP32")
    tensor.set_data_from_numpy(array)
    return [tensor]


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_what_the_client_asks_of_server_and_model(server: Server, kind: str) -> None:
    module, client = client_of(kind, server)
    wait_for(client.is_server_live)
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1.5")
    assert not client.is_model_ready("none")
    assert plain(client.get_server_metadata())["name"] == "kedge-agent"
    metadata = plain(client.get_model_metadata("tiny"))
    assert metadata["versions"] == ["1.5"]
    assert [str(axis) for axis in metadata["inputs"][0]["shape"]] == ["-1", "16"]
    config = plain(client.get_model_config("tiny"))
    config = config.get("config", config)
    assert config["backend"] == "onnxruntime"
    assert config["input"][0]["name"] == "input"
    (row,) = plain(client.get_model_repository_index()) if kind == "http" else _models(client)
    assert (row["name"], row["version"], row["state"]) == ("tiny", "1.5", "READY")
    before = _answered(client)
    client.infer("tiny", given(module, samples(2)))
    assert _answered(client) == before + 1
    with pytest.raises(module.InferenceServerException, match="none"):
        client.get_model_metadata("none")


def _models(client: Any) -> list[dict[str, Any]]:
    models: list[dict[str, Any]] = plain(client.get_model_repository_index())["models"]
    return models


def _answered(client: Any) -> int:
    (row,) = plain(client.get_inference_statistics("tiny"))["model_stats"]
    return int(row["inference_stats"]["success"].get("count", 0))


def test_grpc_tells_how_calls_are_gathered(tmp_path: Path) -> None:
    """HTTP says the same, see ``test_plans_of_calls.py``."""
    import tritonclient.grpc as module
    from tritonclient.grpc import model_config_pb2

    from kedge_agent.serving.grpc_server import GrpcServer

    install(tmp_path / "state", make_bundle(tmp_path))
    folder = ModelFolder(tmp_path / "state", "tiny")
    slot, cache = folder.current(), folder.cache
    assert slot is not None
    assert cache is not None
    limits = (Gathered(values=16, most=4, gain=2.0),)
    plan = CallPlan(cores=plans.cores(), options={"threads": 1}, at_once=1, gathered=limits)
    plans.write(cache, slot.bundle().config, plan)
    models = ServedModels(tmp_path / "state")
    models.scan()
    server = GrpcServer(InferenceHandler(models), ServerSettings(grpc_listen="127.0.0.1:0"))
    server.start()
    try:
        client = module.InferenceServerClient(f"127.0.0.1:{server.port}")
        client.infer("tiny", given(module, samples(2)))
        config = client.get_model_config("tiny").config
        assert list(config.dynamic_batching.preferred_batch_size) == [4]
        (group,) = config.instance_group
        assert (group.count, group.kind) == (1, model_config_pb2.ModelInstanceGroup.KIND_CPU)
        (row,) = client.get_inference_statistics("tiny").model_stats
        # One sample warms up.
        assert {one.batch_size: one.compute_infer.count for one in row.batch_stats} == {1: 1, 2: 1}
    finally:
        server.stop(0.0)


def test_a_call_over_grpc_waits_for_its_model_to_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tritonclient.grpc as module

    from kedge_agent.serving.grpc_server import GrpcServer

    install(tmp_path / "state", make_bundle(tmp_path))
    models = ServedModels(tmp_path / "state")
    monkeypatch.setattr(models, "wait_for", lambda *_: models.scan())
    server = GrpcServer(InferenceHandler(models), ServerSettings(grpc_listen="127.0.0.1:0"))
    server.start()
    try:
        client = module.InferenceServerClient(f"127.0.0.1:{server.port}")
        assert not client.is_server_ready()
        assert client.infer("tiny", given(module, samples(2))).as_numpy("scores").shape == (2, 4)
    finally:
        server.stop(0.0)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_inference_classification_and_errors(server: Server, kind: str) -> None:
    module, client = client_of(kind, server)
    result = client.infer("tiny", given(module, samples(2)), request_id="7")
    np.testing.assert_array_equal(result.as_numpy("scores"), server.expected)
    assert plain(result.get_response())["id"] == "7"
    top = client.infer(
        "tiny", given(module, samples(2)), outputs=[module.InferRequestedOutput("scores", class_count=2)]
    )
    rows = top.as_numpy("scores")
    assert rows.shape == (2, 2)
    for row, scores in zip(rows, server.expected, strict=True):
        best = np.argsort(-scores)[:2]
        assert [text.decode().split(":")[1:] for text in row] == [[str(at), LABELS[at]] for at in best]
    for bad, words in (
        (given(module, samples(2)[:, :8]), "does not fit"),
        ([module.InferInput("input", [1, 16], "BYTES").set_data_from_numpy(np.full((1, 16), b"x", object))], "text"),
    ):
        with pytest.raises(module.InferenceServerException, match=words):
            client.infer("tiny", bad)


def test_the_http_client_sends_json_and_compressed_bodies_too(server: Server) -> None:
    module, client = client_of("http", server)
    tensor = module.InferInput("input", [2, 16], "FP32")
    tensor.set_data_from_numpy(samples(2), binary_data=False)
    output = module.InferRequestedOutput("scores", binary_data=False)
    for compression in (None, "gzip", "deflate"):
        result = client.infer(
            "tiny",
            [tensor],
            outputs=[output],
            request_compression_algorithm=compression,
            response_compression_algorithm=compression,
        )
        np.testing.assert_array_equal(result.as_numpy("scores"), server.expected)


def test_a_model_is_unloaded_and_loaded(server: Server) -> None:
    module, client = client_of("grpc", server)
    client.unload_model("tiny")
    assert not client.is_model_ready("tiny")
    assert _models(client)[0]["state"] == "UNAVAILABLE"
    client_of("http", server)[1].load_model("tiny")
    np.testing.assert_array_equal(client.infer("tiny", given(module, samples(2))).as_numpy("scores"), server.expected)


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_asyncio_clients_many_at_once(server: Server, kind: str) -> None:
    async def ask() -> list[Any]:
        if kind == "http":
            import tritonclient.http.aio as module

            address = server.http
        else:
            import tritonclient.grpc.aio as module

            address = server.grpc
        async with module.InferenceServerClient(address) as client:
            calls = [client.infer("tiny", given(module, samples(2))) for _ in range(16)]
            return [result.as_numpy("scores") for result in await asyncio.gather(*calls)]

    for found in asyncio.run(ask()):
        np.testing.assert_array_equal(found, server.expected)
        assert found.shape == (2, CLASSES)


def test_a_stream_of_requests_over_grpc(server: Server) -> None:
    module, client = client_of("grpc", server)
    results: list[Any] = []
    client.start_stream(lambda result, error: results.append((result, error)))
    for _ in range(3):
        client.async_stream_infer("tiny", given(module, samples(2)))
    client.async_stream_infer("none", given(module, samples(2)))
    client.stop_stream()
    assert [error is None for _, error in results] == [True, True, True, False]
    np.testing.assert_array_equal(results[0][0].as_numpy("scores"), server.expected)


def test_grpc_calls_wait_while_the_process_is_started_anew(server: Server) -> None:
    import tritonclient.grpc as module

    children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
    for _ in range(3):
        wait_for(lambda: len(children.read_text().split()) == 1, what="one serving process")
        child = int(children.read_text())
        os.kill(child, signal.SIGKILL)
        wait_for(lambda child=child: not Path(f"/proc/{child}").exists(), what="its end")
        # A connection of its own: those of other clients broke with the process.
        alone = [("grpc.use_local_subchannel_pool", 1)]
        with module.InferenceServerClient(server.grpc, channel_args=alone) as client:
            array = samples(2)
            answer = client.infer("tiny", given(module, array), client_timeout=60)
            np.testing.assert_allclose(answer.as_numpy("scores"), server.expected, rtol=1e-5)


def test_a_load_over_grpc_changes_no_bundle(server: Server) -> None:
    import tritonclient.grpc as module

    with module.InferenceServerClient(server.grpc) as client:
        with pytest.raises(module.InferenceServerException, match="loaded as it was compiled"):
            client.load_model("tiny", config='{"max_batch_size": 8}')
        client.load_model("tiny")
