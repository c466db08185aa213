"""A release is an OCI image layout that skopeo handles: looked at, copied, pushed to a registry and pulled back, its
digests unchanged."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.bundles import make_bundle
from tests.support.ports import free_port, listens
from tests.support.waiting import wait_for

from kedge_agent.serving.standalone import install
from kedge_agent.slots import ModelFolder
from kedge_protocol import digest
from kedge_protocol.bundle.layout import Layout

TARGETS = ("generic-cpu", "rpi4")

pytestmark = pytest.mark.needs("skopeo")


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release of two bundles with a file of several blocks."""
    return make_bundle(tmp_path, name="tiny", version="1.0", target=TARGETS, mebibytes=0.5)


def skopeo(*arguments: str) -> bytes:
    done = subprocess.run(["skopeo", *arguments], capture_output=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def copy(source: str, target: str, *options: str) -> None:
    skopeo("--insecure-policy", "copy", "--all", "--preserve-digests", *options, source, target)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[str]:
    """``host:port`` of an empty registry on the loopback."""
    port = free_port()
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nlog: {{level: error}}\n"
        f"storage: {{filesystem: {{rootdirectory: {tmp_path / 'registry'}}}}}\n"
        f"http: {{addr: '127.0.0.1:{port}'}}\n"
    )
    with (tmp_path / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(config)], stdout=log, stderr=log)
    try:
        wait_for(lambda: process.poll() is not None or listens(port), what="the registry")
        assert process.poll() is None, (tmp_path / "registry.log").read_text()
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def same(first: Path, second: Path) -> None:
    """Both layouts hold the same release and the same bundles, every blob whole."""
    one, two = Layout(first), Layout(second)
    two.verify()
    assert two.release().raw == one.release().raw
    assert {t: two.bundle(t).raw for t in TARGETS} == {t: one.bundle(t).raw for t in TARGETS}


@pytest.mark.parametrize("reference", ["1.0", "1.0-rpi4", "1.0-generic-cpu"])
def test_inspect_raw_gives_the_very_bytes(release: Path, reference: str) -> None:
    view = Layout(release).release()
    raw = skopeo("inspect", "--raw", f"oci:{release}:{reference}")
    wanted = view.digest if reference == "1.0" else view.bundles[reference.removeprefix("1.0-")].digest
    assert digest.of_bytes(raw) == wanted
    document = json.loads(raw)
    if reference == "1.0":
        assert [entry["annotations"]["io.kedge.target"] for entry in document["manifests"]] == list(TARGETS)
        assert all("platform" not in entry and "artifactType" not in entry for entry in document["manifests"])
    else:
        assert document["artifactType"] == "application/vnd.kedge.bundle.v1"
        assert all("org.opencontainers.image.title" in layer["annotations"] for layer in document["layers"])


def test_a_release_is_copied_to_another_layout(release: Path, tmp_path: Path) -> None:
    copy(f"oci:{release}:1.0", f"oci:{tmp_path / 'COPY'}:1.0")
    same(release, tmp_path / "COPY")


@pytest.mark.parametrize("target", TARGETS)
def test_one_bundle_is_copied_to_another_layout(release: Path, tmp_path: Path, target: str) -> None:
    copy(f"oci:{release}:1.0-{target}", f"oci:{tmp_path / 'COPY'}:one")
    copied = Layout(tmp_path / "COPY")
    (descriptor,) = copied.index.manifests
    assert copied.read_bundle(descriptor).raw == Layout(release).bundle(target).raw


@pytest.mark.needs("docker-registry")
def test_a_release_goes_to_a_registry_and_back(release: Path, tmp_path: Path, registry: str) -> None:
    copy(f"oci:{release}:1.0", f"docker://{registry}/kedge/tiny:1.0", "--dest-tls-verify=false")
    copy(f"docker://{registry}/kedge/tiny:1.0", f"oci:{tmp_path / 'BACK'}:1.0", "--src-tls-verify=false")
    same(release, tmp_path / "BACK")
    # What `kedge-agent serve` takes from there is the same bundle too.
    (tmp_path / "scratch").mkdir()
    source = f"{registry}/kedge/tiny:1.0"
    bundle = install(source, tmp_path / "scratch", target="rpi4", state=tmp_path).settle(None)
    assert bundle.raw == Layout(release).bundle("rpi4").raw
    slot = ModelFolder(tmp_path / "scratch", "tiny").current()
    assert slot is not None
    assert slot.digest == bundle.digest


@pytest.mark.needs("docker-registry")
@pytest.mark.parametrize("backend", [None, "openvino"])
def test_several_bundles_of_a_target_are_served_from_a_registry(
    tmp_path: Path, registry: str, backend: str | None
) -> None:
    release = make_bundle(tmp_path, also={"openvino": None})
    copy(f"oci:{release}:1.0", f"docker://{registry}/kedge/tiny:1.0", "--dest-tls-verify=false")
    (tmp_path / "scratch").mkdir()
    installed = install(
        f"{registry}/kedge/tiny:1.0", tmp_path / "scratch", target="generic-cpu", state=tmp_path, backend=backend
    )
    expected = [one.digest for one in Layout(release).candidates("generic-cpu")]
    assert [slot.digest for slot in installed.slots] == (expected if backend is None else expected[1:])


@pytest.mark.needs("docker-registry")
@pytest.mark.parametrize("target", TARGETS)
def test_one_bundle_goes_to_a_registry_and_back(release: Path, tmp_path: Path, registry: str, target: str) -> None:
    there = f"docker://{registry}/kedge/tiny:1.0-{target}"
    copy(f"oci:{release}:1.0-{target}", there, "--dest-tls-verify=false")
    raw = skopeo("inspect", "--raw", "--tls-verify=false", there)
    assert raw == Layout(release).bundle(target).raw
    copy(there, f"oci:{tmp_path / 'BACK'}:one", "--src-tls-verify=false")
    back = Layout(tmp_path / "BACK")
    assert back.read_bundle(back.index.manifests[0]).raw == raw
