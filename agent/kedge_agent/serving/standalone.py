"""``kedge-agent serve``: serves releases over HTTP without a fleet, from folders, registries or installed models."""

from __future__ import annotations

import contextlib
import logging
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kedge_agent.opening import chosen_target
from kedge_agent.own_proofs import OwnProofs
from kedge_agent.serving.access import tls_context
from kedge_agent.serving.registry_client import RegistryClient, parse_reference
from kedge_agent.serving.settings import ServerSettings, address_of, checked_access, checked_exposure
from kedge_agent.serving.supervisor import ServingSupervisor
from kedge_agent.slots import VERSIONS, ModelFolder, Slot, default_state, further_states, model_names
from kedge_protocol import digest
from kedge_protocol.bundle.layout import Bundle, Layout, of_backend
from kedge_protocol.errors import ConfigError, InputError, StorageError
from kedge_targets.worker import environment

log = logging.getLogger("kedge.serving")

_TICK = 0.1


def serve(
    sources: Sequence[str],
    *,
    target: str | None = None,
    backend: str | None = None,
    listen: Sequence[str] = ("127.0.0.1:8080",),
    settings: ServerSettings | None = None,
    insecure: bool = False,
    proof: bool = True,
    state: Path | None = None,
    announce: Callable[[str], None] = lambda line: None,
    on_progress: Callable[[str], None] = lambda line: None,
) -> None:
    """Serve releases until SIGTERM or SIGINT; to be called in the main thread.

    Args:
        sources: release folders (``kedge compile -o``), references of a registry
            (``[oci://]host/name[:tag|@digest]``), or names of installed models.
        target: which bundle of each release; may be omitted if a release has one.
        backend: which of a target's bundles, if a release holds several; None for the one that is faster here.
        listen: addresses, ``host:port`` or ``unix:PATH``.
        settings: limits and access rules of the server.
        insecure: allow listening beyond this machine without authentication.
        proof: whether bundles are proved and measured here first, see :mod:`kedge_agent.own_proofs`; otherwise the
            compiler's first one is served as it was compiled.
        state: the agent's state folder with installed models; None for the default.
        announce: called with a line for each served model and each address.
        on_progress: called with a line for what takes a while.

    Raises:
        ConfigError: an address, a token or certificate file, or a registry that cannot be used.
        InputError: a source is none of the three.
        BundleError: a release is damaged, or has no bundle for the target.
        VerificationError: a bundle does not pass its proof.
        StorageError: a copy cannot be written.
    """
    # What is unpacked goes with this process, also before it serves.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    settings = replace(settings or ServerSettings(), fleet=False, cascade=True)
    settings.token()
    checked_access(settings)
    tls_context(settings)
    for address in (*listen, *([settings.grpc_listen] if settings.grpc_listen else ())):
        checked_exposure(address, settings, insecure=insecure)
    with tempfile.TemporaryDirectory(prefix="kedge-serve-") as scratch:
        state = state or default_state()
        installed = [install(one, Path(scratch), target=target, backend=backend, state=state) for one in sources]
        cache = _cache(sources, state)
        for into in (Path(scratch), *further_states(Path(scratch))):
            (into / "cache").symlink_to(cache)
        # Sockets come first: an address that is taken is told before the long work.
        with contextlib.closing(_Server(Path(scratch), listen, settings)) as server:
            proofs = OwnProofs(cache, on_progress) if proof else None
            for one in installed:
                bundle = one.settle(proofs)
                config = bundle.config
                announce(f"{config.name} {config.version} for {config.target}, {bundle.digest[:19]}")
            server.run(announce)


@dataclass(frozen=True)
class Installed:
    """The bundles of one source in a state folder, the first of them current.

    Attributes:
        slots: in the compiler's order.
        proved: whether the agent has proved it on this machine.
    """

    folder: ModelFolder
    slots: tuple[Slot, ...]
    proved: bool = False

    def settle(self, proofs: OwnProofs | None) -> Bundle:
        """Let the better bundle be the current one, and return it; without proofs, the first.

        Raises:
            As :meth:`OwnProofs.best`.
        """
        bundles = [slot.bundle() for slot in self.slots]
        chosen = 0
        if proofs is not None and not self.proved:
            chosen = proofs.best(bundles, [slot.folder for slot in self.slots])
        self.folder.switch(self.slots[chosen])
        return bundles[chosen]


def install(source: str, into: Path, *, target: str | None, state: Path, backend: str | None = None) -> Installed:
    """Install the bundles that a source names into a state folder.

    Raises:
        As :func:`serve`.
    """
    with _opened(source, into, target, state, backend) as opened:
        config = opened.bundles[0].config
        if config.generation is not None and config.generation.part is not None:
            raise InputError(
                f"holds {config.generation.part.words} of a model that is split over devices",
                where=source,
                remedy="Roll it out: agents know the other devices, by [split] of agent.toml",
            )
        folder = ModelFolder(into, config.name)
        there = [*further_states(into), into] if folder.current() is not None else []
        for other in filter(None, (ModelFolder(one, config.name).current() for one in there)):
            if other.bundle().config.version == config.version:
                raise InputError(
                    f"two sources give {config.name!r} {config.version}",
                    where=source,
                    remedy="Serve one of them: a model is told by its name and version",
                )
        if there:
            further = into / VERSIONS / digest.hex_of(opened.bundles[0].digest)[:16]
            further.mkdir(parents=True)
            folder = ModelFolder(further, config.name)
        blobs = into / "blobs"
        blobs.mkdir(exist_ok=True)
        slots = tuple(_assembled(folder, bundle, opened.blob, blobs) for bundle in opened.bundles)
        folder.switch(slots[0])
        shutil.rmtree(blobs)
    return Installed(folder, slots, opened.proved)


def _assembled(folder: ModelFolder, bundle: Bundle, blob: Callable[[str], Path], blobs: Path) -> Slot:
    for layer in bundle.files.values():
        copy = blobs / digest.hex_of(layer.digest)
        if not copy.exists():
            _copied(blob(layer.digest), copy)
            digest.verify_file(copy, layer.digest)
    return folder.assemble(bundle, lambda name: blobs / digest.hex_of(name))


def _cache(sources: Sequence[str], state: Path) -> Path:
    """Return the folder of what is built and measured here: the agent's if its models are served and it is this user's,
    else the user's own."""
    there = model_names(state)
    owned = ModelFolder(state, sources[0]).cache if all(source in there for source in sources) else None
    return (owned or environment.cache_dir()).absolute()


@dataclass(frozen=True)
class _Opened:
    """Bundles to be installed, and where their blobs are."""

    bundles: tuple[Bundle, ...]
    blob: Callable[[str], Path]
    proved: bool = False


@contextlib.contextmanager
def _opened(source: str, into: Path, target: str | None, state: Path, backend: str | None) -> Iterator[_Opened]:
    """Yield the bundles that a source names."""
    path = Path(source)
    if path.is_dir():
        layout = Layout(path)
        bundles = of_backend(layout.candidates(chosen_target(layout, target)), backend, where=source)
        yield _Opened(bundles, layout.blob_path)
        return
    if source in model_names(state):
        slot = ModelFolder(state, source).current()
        if slot is not None:
            bundle = slot.bundle()
            titles = {layer.digest: title for title, layer in bundle.files.items()}
            owned = ModelFolder(state, source).cache is not None
            yield _Opened((bundle,), lambda name: slot.folder / titles[name], proved=owned)
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
        bundles = client.pull_bundles(layout, chosen_target(layout, target), backend)
        yield _Opened(of_backend(bundles, backend, where=source), layout.blob_path)


def _copied(source: Path, copy: Path) -> None:
    """Hard-link a file if possible, that is on the same file system; otherwise copy it."""
    with contextlib.suppress(OSError):
        copy.hardlink_to(source)
        return
    try:
        shutil.copyfile(source, copy)
    except OSError as error:
        raise StorageError(f"cannot be copied: {error.strerror}", where=str(source)) from error


class _Server:
    """A supervised serving process, and its sockets."""

    def __init__(self, state: Path, listen: Sequence[str], settings: ServerSettings) -> None:
        self._encrypted = settings.tls_cert is not None
        self._supervisor = ServingSupervisor(state, listen, settings)
        try:
            self._sockets = self._supervisor.listen()
        except ConfigError:
            self.close()
            raise

    def run(self, announce: Callable[[str], None]) -> None:
        """Serve until SIGTERM or SIGINT."""
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        for one in self._sockets:
            announce(f"listening on {address_of(one, encrypted=self._encrypted)}")
        supervisor = self._supervisor
        while not stop.wait(_TICK):
            if supervisor.poll(time.monotonic()) and not supervisor.died_serving and supervisor.deaths > 2:
                raise ConfigError(f"the serving process cannot begin: it {supervisor.last_words}")

    def close(self) -> None:
        self._supervisor.stop()
