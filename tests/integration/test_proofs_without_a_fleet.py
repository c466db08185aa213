"""Without a fleet a bundle is proved and measured once on a machine, and of several for one target the better one is
taken, by ``kedge-agent serve`` and by ``Model``."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.standalone import serving

from kedge_agent import Model
from kedge_agent.own_proofs import KeptProof
from kedge_agent.proving import Proof
from kedge_agent.slots import ModelFolder
from kedge_protocol import codec
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.errors import BundleError, InputError, VerificationError
from kedge_targets.calls import plan as plans

FIRST, SECOND = "onnxruntime", "openvino"
TARGET = "generic-cpu"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KEDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def kept(cache: Path) -> dict[str, Path]:
    """Digest → file of the proofs that are kept."""
    return {f"sha256:{path.stem}": path for path in (cache / "proofs").glob("*.json")}


def by_backend(release: Path) -> dict[str, Bundle]:
    return {one.config.backend: one for one in Layout(release).candidates(TARGET)}


def say(cache: Path, bundle: Bundle, p50_ms: float) -> None:
    """Let what was measured of a bundle be something else."""
    path = kept(cache)[bundle.digest]
    told = codec.decode(path.read_bytes(), KeptProof, where="")
    path.write_bytes(codec.encode(replace(told, proof=Proof(None, p50_ms, p50_ms, 9))))


def refused(*arguments: str) -> str:
    command = [sys.executable, "-m", "kedge_agent.cli", "serve", *arguments, "--listen", "127.0.0.1:0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    return done.stderr


def served_calls(release: str, *arguments: str, proof: bool = True) -> Any:
    """What the served model's metadata say of how its calls are run."""
    with serving(release, *arguments, "--listen", "127.0.0.1:0", proof=proof) as server:
        server.wait()
        return server.ask("GET", "/v2/models/tiny")[1]["parameters"].get("calls")


@pytest.mark.device
def test_a_served_release_is_proved_once_and_its_calls_follow_the_plan(tmp_path: Path, cache: Path) -> None:
    release = make_bundle(tmp_path)
    assert served_calls(str(release), proof=False) is None
    assert not kept(cache)
    calls = served_calls(str(release))
    (bundle,) = Layout(release).candidates(TARGET)
    plan = plans.read(cache, bundle.config)
    assert plan is not None
    assert calls["at_once"] == plan.at_once
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")}
    assert kept(cache).keys() == {bundle.digest}
    assert served_calls(str(release)) == calls
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.json")} == before
    # The same plan is followed in an application's process.
    with Model(release, target=TARGET) as model:
        assert model.loaded().plan == plan


@pytest.mark.device
def test_what_does_not_hold_here_is_not_served(tmp_path: Path, cache: Path) -> None:
    release = str(make_bundle(tmp_path, broken="golden"))
    assert "golden" in refused(release)
    assert not kept(cache)
    with serving(release, "--listen", "127.0.0.1:0") as server:
        server.wait()


@pytest.mark.device
def test_a_proof_holds_for_the_runtime_and_the_cores_that_it_was_made_with(tmp_path: Path, cache: Path) -> None:
    release = make_bundle(tmp_path)
    served_calls(str(release))
    (path,) = kept(cache).values()
    told = codec.decode(path.read_bytes(), KeptProof, where="")
    for other in (replace(told, cores=told.cores + 1), replace(told, runtimes={"onnxruntime": "1.0"})):
        path.write_bytes(codec.encode(other))
        served_calls(str(release))
        assert codec.decode(path.read_bytes(), KeptProof, where="").runtimes == told.runtimes


@pytest.mark.device
def test_an_installed_model_of_this_user_goes_by_its_agents_plan(tmp_path: Path, cache: Path) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path))
    folder = ModelFolder(state, "tiny")
    slot, own = folder.current(), folder.cache
    assert slot is not None
    assert own is not None
    way = plans.CallPlan(cores=plans.cores(), options={"threads": 1}, at_once=2)
    plans.write(own, slot.bundle().config, way)
    assert served_calls("tiny", "--state", str(state))["at_once"] == 2
    assert not kept(cache)


def test_of_two_bundles_the_better_one_is_served_and_called(tmp_path: Path, cache: Path) -> None:
    release = make_bundle(tmp_path, also={SECOND: None})
    two = by_backend(release)
    with Model(release, target=TARGET) as model:
        expected = model(samples(2))
        assert model.config.backend in two
    assert kept(cache).keys() == {one.digest for one in two.values()}
    for fast, slow in ((FIRST, SECOND), (SECOND, FIRST)):
        say(cache, two[fast], 1.0)
        say(cache, two[slow], 2.0)
        with Model(release, target=TARGET) as model:
            assert model.config.backend == fast
            np.testing.assert_allclose(model(samples(2)), expected, rtol=1e-4)
        with serving(str(release), "--listen", "127.0.0.1:0", proof=True) as server:
            assert two[fast].digest[:19] in server.lines[0]
    # A named one is taken unmeasured.
    for file in kept(cache).values():
        file.unlink()
    with Model(release, target=TARGET, backend=SECOND) as model:
        assert model.config.backend == SECOND
    with serving(str(release), "--backend", SECOND, "--listen", "127.0.0.1:0") as server:
        assert two[SECOND].digest[:19] in server.lines[0]
    assert not kept(cache)
    command = [sys.executable, "-m", "kedge_agent.cli", "infer", str(release), "--target", TARGET, "--backend", SECOND]
    done = subprocess.run(
        [*command, "--input", "-"], input=json.dumps(samples(1).tolist()), capture_output=True, text=True, check=True
    )
    np.testing.assert_allclose(json.loads(done.stdout)["scores"], expected[:1], rtol=1e-4)
    with pytest.raises(BundleError, match="It has: onnxruntime, openvino"):
        Model(release, target=TARGET, backend="tflite")
    with pytest.raises(InputError, match="has one backend"):
        Model("tiny", backend=SECOND, state=tmp_path)


def test_a_bundle_that_fails_here_leaves_the_other_one(tmp_path: Path, cache: Path) -> None:
    release = make_bundle(tmp_path, broken="golden", also={SECOND: None})
    with Model(release, target=TARGET) as model:
        assert model.config.backend == SECOND
    both = make_bundle(tmp_path, "worse", broken="golden", also={SECOND: "golden"})
    with pytest.raises(VerificationError, match=r"none of the 2 bundles .* by onnxruntime: .* by openvino: "):
        Model(both, target=TARGET)


@pytest.mark.device
def test_a_cache_that_cannot_be_written_only_costs_the_next_proof(tmp_path: Path, cache: Path) -> None:
    cache.write_text("no folder")
    assert served_calls(str(make_bundle(tmp_path))) is None
