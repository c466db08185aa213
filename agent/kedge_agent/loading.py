"""Loads a bundle from an installed model's slot or from a release folder."""

from __future__ import annotations

import contextlib
import mmap
import shutil
import tempfile
import time
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_agent import malloc, room, slots
from kedge_agent.counters import open_counter
from kedge_agent.loaded import Loaded, warm_up
from kedge_agent.observing import observer_of
from kedge_agent.paces import Paces
from kedge_protocol import digest
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.layout import Bundle, Layout, of_backend
from kedge_protocol.errors import BundleError, InputError, KedgeError, StorageError
from kedge_targets.executor import Executor

if TYPE_CHECKING:
    from kedge_agent.generation.generator import TextGenerator
    from kedge_agent.split.holder import PartHolder
    from kedge_targets.pipeline.execution import Runner

_LOAD_ATTEMPTS = 5
_LOOK_SECONDS = 0.05
_LINGER_SECONDS = 5.0
"""Seconds after the last answer was cut off in which its reader may still hold the bundle."""


def installed(name: str, state: Path | None) -> slots.ModelFolder:
    """Return the folder of an installed model.

    Args:
        state: the agent's state folder; None for the default.

    Raises:
        InputError: no such model is installed.
    """
    state = slots.default_state() if state is None else state
    there = slots.model_names(state)
    if name not in there:
        if (Path(name) / "oci-layout").is_file():
            remedy = "For a release folder name the target too: Model(folder, target=...)"
        else:
            remedy = f"Installed are: {', '.join(there)}" if there else "Nothing is installed there yet"
        raise InputError(f"no model {name!r} is installed", where=str(state), remedy=remedy)
    return slots.ModelFolder(state, name)


def mapped(path: Path) -> memoryview:
    """Map a file of one little-endian 64-bit number as a live view. A big-endian machine reads another number, which is
    fine: it is only compared with itself."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("Q")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot be mapped: {error}", where=str(path), remedy="Let this user read the agent's state folder"
        ) from error


def crowded(slot: slots.Slot, old: Loaded) -> bool:
    """Return whether memory has no room for a slot's bundle beside the loaded one."""
    try:
        return not room.fits_beside(slot.bundle().config, old.bundle.config)
    except (OSError, KedgeError):
        return False  # loading it says what is wrong


def wait_until_gone(leaving: weakref.ref[Any]) -> None:
    """Wait until nothing uses a retired bundle any more, not much longer than :data:`room.SWITCH_SECONDS`."""
    until = time.monotonic() + room.SWITCH_SECONDS + _LINGER_SECONDS
    while leaving() is not None and time.monotonic() < until:
        time.sleep(_LOOK_SECONDS)
    malloc.give_back()


def load_slot(folder: slots.ModelFolder, generation: int, *, instead: slots.Slot | None = None) -> Loaded:
    """Load an installed model's current bundle.

    Args:
        generation: the model's generation, read before.
        instead: load this slot, and not the current one.

    Raises:
        InputError: the model was removed.
        StorageError: its files cannot be read.
        KedgeError: the runtime refuses it.
    """
    for attempt in range(_LOAD_ATTEMPTS):
        slot = instead or folder.current()
        if slot is None:
            raise InputError(f"the model {folder.name!r} was taken off this device", where=str(folder.path))
        try:
            bundle = slot.bundle()
            pipeline = _pipeline(slot.folder, bundle.config)
            executor = _executor(slot.folder, bundle, folder.cache, folder.state)
        except (OSError, KedgeError) as error:
            # The slot may have been replaced and removed while it was read.
            if instead is None and folder.current() != slot and attempt < _LOAD_ATTEMPTS - 1:
                continue
            if isinstance(error, OSError):
                raise StorageError(
                    f"cannot be read: {error.strerror}",
                    where=str(error.filename or slot.folder),
                    remedy="Let this user read the agent's state folder",
                ) from error
            raise
        warm_up(executor)
        counter = open_counter(folder.counters, digest=bundle.digest, generation=generation)
        observer = observer_of(folder, digest=bundle.digest, config=bundle.config)
        writes = bundle.config.generation is not None and bundle.config.generation.writes
        paces = Paces(folder, digest=bundle.digest, generation=generation) if writes else None
        return Loaded(bundle, executor, counter, pipeline, observer, paces)
    raise StorageError("changes faster than it can be loaded", where=str(folder.path))


def load_release(path: Path, target: str, backend: str | None = None) -> Loaded:
    """Load a bundle of a release folder; of several for the target the one that is better on this machine, see
    :mod:`kedge_agent.own_proofs`.

    Args:
        backend: take the bundle by this one.

    Raises:
        BundleError: the folder is damaged, or has no bundle for the target, or by the backend.
        VerificationError: there are several, and none passes its proof here.
        KedgeError: the runtime refuses it.
    """
    from kedge_targets.worker import environment

    layout = Layout(path)
    bundles = layout.candidates(target)
    if backend is not None:
        bundles = of_backend(bundles, backend, where=str(path))
    with tempfile.TemporaryDirectory(prefix="kedge-model-") as scratch:
        folders = [_unpacked(layout, bundle, Path(scratch)) for bundle in bundles]
        cache = environment.cache_dir()
        chosen = 0
        if len(bundles) > 1:
            from kedge_agent.own_proofs import OwnProofs

            chosen = OwnProofs(cache).best(bundles, folders)
        folder, bundle = folders[chosen], bundles[chosen]
        pipeline = _pipeline(folder, bundle.config)
        executor = _executor(folder, bundle, cache, slots.default_state())
        warm_up(executor)
        return Loaded(bundle, executor, None, pipeline)


def _unpacked(layout: Layout, bundle: Bundle, state: Path) -> Path:
    """Give a bundle's blobs their names, in what will be a slot: some runtimes look for a file beside another by name.
    A runtime keeps open what it needs, so the names may go when it has loaded (as those of a slot may)."""
    slots.check_titles(bundle)
    folder = slots.ModelFolder(state, bundle.config.name).slot(bundle.digest).folder
    folder.mkdir(parents=True)
    for title, layer in bundle.files.items():
        source, copy = layout.blob_path(layer.digest), folder / title
        try:
            _link_or_copy(source, copy)
        except OSError as error:
            raise BundleError(f"blob {layer.digest}: {error.strerror}", where=str(layout.path)) from error
        digest.verify_file(copy, layer.digest)
    (folder / slots.CONFIG_FILE).write_bytes(bundle.config_raw)
    return folder


def _pipeline(folder: Path, config: BundleConfig) -> Runner | None:
    if config.pipeline is None:
        return None
    from kedge_targets.pipeline import cascades

    return cascades.runner_of(folder, config)


def _executor(folder: Path, bundle: Bundle, cache: Path | None, state: Path) -> Executor | TextGenerator | PartHolder:
    config = bundle.config
    if config.generation is None:
        return Executor.of(folder, config, cache=cache)
    room.admit(config)
    split = None
    if config.generation.part is not None:
        from kedge_agent.split import settings

        split = settings.read(state)
        if not config.generation.writes:
            from kedge_agent.split.holder import PartHolder

            return PartHolder(folder, bundle, split)
    # A device that runs no language model has no tokenizer installed.
    from kedge_agent.generation.generator import TextGenerator

    return TextGenerator(folder, config, split, cache)


def _link_or_copy(source: Path, copy: Path) -> None:
    with contextlib.suppress(OSError):
        copy.hardlink_to(source)
        return
    shutil.copyfile(source, copy)
