"""``kedge-agent serve``: serves releases over HTTP without a fleet, from folders, registries or installed models."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kedge_agent.serving.registry_client import RegistryClient, parse_reference
from kedge_agent.serving.settings import ServerSettings, address_of, checked_exposure
from kedge_agent.serving.supervisor import ServingSupervisor
from kedge_agent.slots import VERSIONS, ModelFolder, default_state, further_states, model_names
from kedge_protocol import digest
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.errors import BundleError, ConfigError, InputError, StorageError

log = logging.getLogger("kedge.serving")

_TICK = 0.1


def serve(
    sources: Sequence[str],
    *,
    target: str | None = None,
    listen: Sequence[str] = ("127.0.0.1:8080",),
    settings: ServerSettings | None = None,
    insecure: bool = False,
    state: Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve releases until SIGTERM or SIGINT; to be called in the main thread.

    Args:
        sources: release folders (``kedge compile -o``), references of a registry
            (``[oci://]host/name[:tag|@digest]``), or names of installed models.
        target: which bundle of each release; may be omitted if a release has one.
        listen: addresses, ``host:port`` or ``unix:PATH``.
        settings: limits and access rules of the server.
        insecure: allow listening beyond this machine without authentication.
        state: the agent's state folder with installed models; None for the default.
        announce: called with a line for each served model and each address.

    Raises:
        ConfigError: an address, a token or certificate file, or a registry that cannot be used.
        InputError: a source is none of the three.
        BundleError: a release is damaged, or has no bundle for the target.
        StorageError: a copy cannot be written.
    """
    settings = replace(settings or ServerSettings(), fleet=False, cascade=True)
    settings.token()
    for address in (*listen, *([settings.grpc_listen] if settings.grpc_listen else ())):
        checked_exposure(address, settings, insecure=insecure)
    with tempfile.TemporaryDirectory(prefix="kedge-serve-") as scratch:
        for source in sources:
            bundle = install(source, Path(scratch), target=target, state=state or default_state())
            announce(f"{bundle.config.name} {bundle.config.version} for {bundle.config.target}, {bundle.digest[:19]}")
        supervisor = ServingSupervisor(Path(scratch), listen, settings)
        for one in supervisor.listen():
            announce(f"listening on {address_of(one)}")
        _run(supervisor)


def install(source: str, into: Path, *, target: str | None, state: Path) -> Bundle:
    """Install the bundle that a source names into a state folder.

    Raises:
        As :func:`serve`.
    """
    with _opened(source, into, target, state) as (bundle, blob):
        folder = ModelFolder(into, bundle.config.name)
        there = [*further_states(into), into] if folder.current() is not None else []
        for other in filter(None, (ModelFolder(one, bundle.config.name).current() for one in there)):
            if other.bundle().config.version == bundle.config.version:
                raise InputError(
                    f"two sources give {bundle.config.name!r} {bundle.config.version}",
                    where=source,
                    remedy="Serve one of them: a model is told by its name and version",
                )
        if there:
            further = into / VERSIONS / digest.hex_of(bundle.digest)[:16]
            further.mkdir(parents=True)
            folder = ModelFolder(further, bundle.config.name)
        blobs = into / "blobs"
        blobs.mkdir(exist_ok=True)
        for layer in bundle.files.values():
            _copied(blob(layer.digest), blobs / digest.hex_of(layer.digest))
            digest.verify_file(blobs / digest.hex_of(layer.digest), layer.digest)
        folder.switch(folder.assemble(bundle, lambda name: blobs / digest.hex_of(name)))
        shutil.rmtree(blobs)
    return bundle


@contextlib.contextmanager
def _opened(source: str, into: Path, target: str | None, state: Path) -> Iterator[tuple[Bundle, Callable[[str], Path]]]:
    """Yield the bundle that a source names, and a function that locates its blobs."""
    path = Path(source)
    if path.is_dir():
        layout = Layout(path)
        yield layout.bundle(_chosen(layout, target)), layout.blob_path
        return
    if source in model_names(state):
        slot = ModelFolder(state, source).current()
        if slot is not None:
            bundle = slot.bundle()
            titles = {layer.digest: title for title, layer in bundle.files.items()}
            yield bundle, lambda name: slot.folder / titles[name]
            return
    reference = parse_reference(source)
    if reference is None:
        there = ", ".join(model_names(state)) or "none"
        raise InputError(
            f"{source!r} is no release folder, no model that is installed and no reference of a registry",
            remedy=f"Give a folder of `kedge compile -o`, or host/name:tag; installed are: {there}",
        )
    with tempfile.TemporaryDirectory(prefix="pull-", dir=into) as folder:
        client = RegistryClient(reference, Path(folder))
        layout = client.pull_index()
        yield client.pull_bundle(layout, _chosen(layout, target)), layout.blob_path


def _chosen(layout: Layout, target: str | None) -> str:
    """Return the chosen target.

    Raises:
        BundleError: no target is given, and the release does not have exactly one bundle.
    """
    if target is not None:
        return target
    there = sorted(layout.release().bundles)
    if len(there) != 1:
        raise BundleError(
            f"has bundles for {len(there)} targets",
            where=str(layout.path),
            remedy=f"Name one with --target: {', '.join(there)}",
        )
    return there[0]


def _copied(source: Path, copy: Path) -> None:
    """Hard-link a file if possible, that is on the same file system; otherwise copy it."""
    with contextlib.suppress(OSError):
        copy.hardlink_to(source)
        return
    try:
        shutil.copyfile(source, copy)
    except OSError as error:
        raise StorageError(f"cannot be copied: {error.strerror}", where=str(source)) from error


def _run(supervisor: ServingSupervisor) -> None:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        while not stop.wait(_TICK):
            if supervisor.poll(time.monotonic()) and not supervisor.died_serving and supervisor.deaths > 2:
                raise ConfigError(f"the serving process cannot begin: it {supervisor.last_words}")
    finally:
        supervisor.stop()
