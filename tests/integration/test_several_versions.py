"""Several versions of one model at once: ``kedge-agent serve`` with three releases, asked by NVIDIA's tritonclient."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.ports import free_port
from tests.support.standalone import Served, serving
from tests.support.waiting import wait_for

from kedge_agent import Model

pytest.importorskip("tritonclient", reason="pip install --no-deps -r constraints/proofs.txt")

VERSIONS = ("1.9", "1.10", "2.0-rc1")
"""Oldest first; given to the command in another order."""


@dataclass
class World:
    served: Served
    grpc: str
    expected: dict[str, Any]

    def client(self, kind: str) -> tuple[Any, Any]:
        """The client's module and a client."""
        if kind == "http":
            import tritonclient.http as module

            return module, module.InferenceServerClient(f"127.0.0.1:{self.served.port}")
        import tritonclient.grpc as module

        return module, module.InferenceServerClient(self.grpc)

    def answers(self, kind: str, version: str = "") -> str:
        """The version that answers, by its numbers and by what it says."""
        module, client = self.client(kind)
        tensor = module.InferInput("input", [2, 16], "FP32")
        tensor.set_data_from_numpy(samples(2))
        found = client.infer("tiny", [tensor], model_version=version)
        response = found.get_response()
        said = response["model_version"] if kind == "http" else response.model_version
        (mine,) = (one for one, scores in self.expected.items() if np.array_equal(found.as_numpy("scores"), scores))
        assert mine == said
        return mine

    def index(self, kind: str) -> dict[str, str]:
        _, client = self.client(kind)
        rows = client.get_model_repository_index()
        if kind == "grpc":
            return {row.version: row.state for row in rows.models}
        return {row["version"]: row["state"] for row in rows}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("versions")
    releases = {version: make_bundle(folder, version=version, seed=seed) for seed, version in enumerate(VERSIONS)}
    expected = {version: Model(path, target="generic-cpu")(samples(2)) for version, path in releases.items()}
    grpc = f"127.0.0.1:{free_port()}"
    given = [str(releases[version]) for version in ("1.10", "2.0-rc1", "1.9")]
    with serving(*given, "--listen", "127.0.0.1:0", "--grpc", grpc) as served:
        served.wait()
        made = World(served, grpc, expected)
        wait_for(made.client("grpc")[1].is_server_ready)
        yield made


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_each_version_answers_and_the_newest_where_none_is_named(world: World, kind: str) -> None:
    module, client = world.client(kind)
    assert [world.answers(kind, version) for version in VERSIONS] == list(VERSIONS)
    assert world.answers(kind) == "2.0-rc1"
    assert world.index(kind) == dict.fromkeys(VERSIONS, "READY")
    metadata = client.get_model_metadata("tiny")
    assert list(metadata["versions"] if kind == "http" else metadata.versions) == list(VERSIONS)
    for version in VERSIONS:
        assert client.is_model_ready("tiny", version)
    assert not client.is_model_ready("tiny", "3")
    with pytest.raises(module.InferenceServerException, match=r"'3' is not here; here are: 1\.9, 1\.10, 2\.0-rc1"):
        world.answers(kind, "3")


def test_an_unknown_version_is_404(world: World) -> None:
    assert world.served.ask("GET", "/v2/models/tiny/versions/3")[0] == 404
    assert world.served.ask("GET", "/v2/models/tiny/versions/1.9/ready")[0] == 200
    assert world.served.ask("POST", "/v2/models/tiny/versions/3/infer", {})[0] == 404
    assert world.served.ask("POST", "/v2/repository/models/tiny/versions/3/load", {})[0] == 404


def counted(world: World, kind: str) -> dict[str, int]:
    _, client = world.client(kind)
    rows = client.get_inference_statistics("tiny")
    if kind == "grpc":
        return {row.version: row.inference_stats.success.count for row in rows.model_stats}
    return {row["version"]: row["inference_stats"]["success"]["count"] for row in rows["model_stats"]}


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_each_version_is_counted_by_itself(world: World, kind: str) -> None:
    before = counted(world, kind)
    for version in ("1.9", "1.9", "1.10"):
        world.answers(kind, version)
    after = counted(world, kind)
    assert {version: after[version] - before[version] for version in VERSIONS} == {"1.9": 2, "1.10": 1, "2.0-rc1": 0}
    metrics = world.served.text("/metrics")
    found = dict(re.findall(r'kedge_requests_total\{model="tiny",version="([^"]+)",outcome="ok"\} (\d+)', metrics))
    assert {version: int(count) for version, count in found.items()} == after


def test_versions_are_unloaded_and_loaded_by_themselves(world: World) -> None:
    repository = "/v2/repository/models/tiny"
    assert world.served.ask("POST", f"{repository}/versions/2.0-rc1/unload", {})[0] == 200
    assert world.answers("http") == "1.10"
    assert world.served.ask("GET", "/v2/models/tiny/versions/2.0-rc1/ready")[0] == 503
    assert world.index("grpc")["2.0-rc1"] == "UNAVAILABLE"
    assert world.served.ask("POST", f"{repository}/versions/2.0-rc1/load", {})[0] == 200
    assert world.answers("grpc") == "2.0-rc1"


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_the_clients_version_policy_chooses(world: World, kind: str) -> None:
    module, client = world.client(kind)

    def load(policy: object) -> None:
        client.load_model("tiny", config=json.dumps({"version_policy": policy}))

    def ready() -> set[str]:
        return {version for version, state in world.index(kind).items() if state == "READY"}

    load({"specific": {"versions": ["1.9"]}})
    assert ready() == {"1.9"}
    assert world.answers(kind) == "1.9"
    load({"latest": {"num_versions": 2}})
    assert ready() == {"1.10", "2.0-rc1"}
    client.unload_model("tiny")
    assert ready() == set()
    client.load_model("tiny")
    assert ready() == set(VERSIONS)
    refused: list[object] = [{"specific": {"versions": ["7"]}}, {"specific": {}}, {"latest": {"num_versions": 0}}, []]
    for policy in refused:
        with pytest.raises(module.InferenceServerException):
            load(policy)
    with pytest.raises(module.InferenceServerException, match="as it was compiled"):
        client.load_model("tiny", config=json.dumps({"max_batch_size": 4}))
    assert ready() == set(VERSIONS)


def test_the_same_version_twice_is_refused(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from kedge_agent.cli import cli

    one, other = (make_bundle(tmp_path / str(seed), version="1.0", seed=seed) for seed in range(2))
    said = CliRunner().invoke(cli, ["serve", str(one), str(other), "--listen", "127.0.0.1:0"])
    assert "two sources give 'tiny' 1.0" in str(said.exception)
