"""The door for applications: a model as a function in their own process."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import shutil
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter_ns
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_agent import slots
from kedge_agent.counters import Counter, open_counter
from kedge_agent.session import Session
from kedge_protocol import digest, tensors
from kedge_protocol.bundle.config import BundleConfig, TensorSpec
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.errors import BundleError, InputError, KedgeError, StorageError
from kedge_targets.executor import Executor

Array = npt.NDArray[Any]

log = logging.getLogger("kedge.model")

_LOAD_ATTEMPTS = 5


class Model:
    """A model that can be called.

    Args:
        source: name of a model that the fleet installed; with ``target``, a release folder (``kedge compile -o``).
        target: which bundle of the release folder.
        state: the agent's state folder; else ``KEDGE_STATE``, else the system's (see
            :func:`kedge_agent.slots.default_state`).

    An installed model follows the fleet: when another bundle was switched to, it is loaded in the background and takes
    over between two calls; calls under way end on the old one. If it cannot be loaded the old one goes on and
    :attr:`failure` says why.

    Raises:
        InputError: no such model, no such folder.
        BundleError: a damaged release folder, or no bundle for ``target``.
        MissingDependencyError: the bundle's runtime is not installed.
        VerificationError: the runtime refuses the file.
    """

    def __init__(
        self, source: str | os.PathLike[str], *, target: str | None = None, state: str | os.PathLike[str] | None = None
    ) -> None:
        self._folder: slots.ModelFolder | None = None
        self._generation: memoryview | None = None
        self._seen = 0
        self._reloading = threading.Lock()
        self._failure: Exception | None = None
        self._failed_loads = 0
        self._loaded: Loaded | None
        if target is not None:
            if state is not None:
                raise InputError("a release folder has no state folder", remedy="Leave out `state` or `target`")
            self._loaded = _load_release(Path(source), target)
        else:
            self._folder = _installed(str(source), slots.default_state() if state is None else Path(state))
            self._generation = _mapped(self._folder.generation_file)
            self._seen = self._generation[0]
            self._loaded = _load_slot(self._folder, self._seen)

    def __call__(self, array: Any = None, /, **named: Any) -> Any:
        """Run the model on raw samples (what stands before the bundle's preprocessing).

        Args:
            array: samples of the only input, first axis the batch; or one sample without that axis, then the result
                has none either. Several inputs: a mapping by name, or keywords.

        Returns:
            The only output as an array of real numbers, or a dictionary by name.

        Raises:
            InputError: a missing or unknown input, a wrong shape or dtype; or the model was closed.
        """
        return self.loaded()(array, named)

    def session(self, **states: Any) -> Session:
        """A sequence of calls of a model with states, which are carried from call to call.

        Args:
            states: what the first call takes, by the inputs' names; zeros otherwise.

        Raises:
            InputError: the model has no states, or none of such a name.
        """
        return Session(self, states)

    def loaded(self) -> Loaded:
        """The bundle that answers now, to be called and asked about itself: what it says belongs to what it computes,
        whatever is switched to meanwhile.

        Raises:
            InputError: the model was closed.
        """
        generation = self._generation
        if generation is not None and generation[0] != self._seen:
            self._reload_in_background()
        loaded = self._loaded
        if loaded is None:
            raise InputError("the model was closed")
        return loaded

    @property
    def digest(self) -> str:
        """Digest of the bundle that answers."""
        return self._bundle.digest

    @property
    def config(self) -> BundleConfig:
        """All that the bundle says of itself."""
        return self._bundle.config

    @property
    def name(self) -> str:
        """The model's name."""
        return self.config.name

    @property
    def version(self) -> str:
        """The release's version."""
        return self.config.version

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in the order of the output's last axis; empty where none were given."""
        return self.config.labels

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What it takes, in order."""
        return self.config.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What it gives, in order."""
        return self.config.outputs

    @property
    def detail(self) -> str:
        """What really runs the model here, in words; empty where the runtime's name says it all."""
        loaded = self._loaded
        return "" if loaded is None else loaded.detail

    @property
    def figures(self) -> Mapping[str, float]:
        """What the runtime measured of the model on this device, by name with its unit; mostly nothing."""
        loaded = self._loaded
        return {} if loaded is None else loaded.figures

    @property
    def failure(self) -> Exception | None:
        """Why the bundle that is installed now is not the one that answers; None where it is."""
        return self._failure

    @property
    def failed_loads(self) -> int:
        """How many bundles could not be loaded when they were switched to."""
        return self._failed_loads

    def refresh(self) -> None:
        """Load what is installed now, if it is another, and wait for it; see :attr:`failure` for the outcome."""
        with self._reloading:
            self._reload()

    def close(self) -> None:
        """Let the model go. Calls under way end well; later ones fail."""
        self._generation = None
        with self._reloading:
            self._loaded = None

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        loaded = self._loaded
        if loaded is None:
            return "<Model, closed>"
        return f"<Model {self.name} {self.version} for {self.config.target}, {self.digest[:19]}>"

    @property
    def _bundle(self) -> Bundle:
        loaded = self._loaded
        if loaded is None:
            raise InputError("the model was closed")
        return loaded.bundle

    def _reload_in_background(self) -> None:
        if not self._reloading.acquire(blocking=False):
            return

        def work() -> None:
            try:
                self._reload()
            finally:
                self._reloading.release()

        try:
            threading.Thread(target=work, name="kedge-reload", daemon=True).start()
        except RuntimeError:
            # No thread to be had; a later call tries again.
            self._reloading.release()

    def _reload(self) -> None:
        """Load until what is loaded is what is installed; the caller holds the lock."""
        folder = self._folder
        while folder is not None and (view := self._generation) is not None and view[0] != self._seen:
            generation = view[0]
            try:
                slot = folder.current()
                before = self._loaded
                if before is None or slot is None or slot.digest != before.bundle.digest:
                    self._loaded = _load_slot(folder, generation)
                self._failure = None
            except KedgeError as error:
                log.error("%s: the new bundle cannot be loaded, the old one goes on: %s", folder.name, error)
                self._note_failure(error)
            except Exception as error:
                # Whatever else a runtime may raise: the old bundle goes on.
                log.exception("%s: the new bundle cannot be loaded, the old one goes on", folder.name)
                self._note_failure(error)
            self._seen = generation

    def _note_failure(self, error: Exception) -> None:
        self._failure = error
        self._failed_loads += 1
        if self._loaded is not None and self._loaded.counter is not None:
            self._loaded.counter.error()


class Loaded:
    """One bundle, ready for calls. It is let go when the last call that uses it has ended."""

    def __init__(self, bundle: Bundle, executor: Executor, counter: Counter | None) -> None:
        self.bundle = bundle
        self.counter = counter
        self.detail = executor.detail
        self.figures = executor.figures
        self._executor = executor
        self._specs = bundle.config.inputs
        only = executor.one
        self._only = None if only is None else (self._specs[0], len(self._specs[0].shape), only)
        self._names = [spec.name for spec in bundle.config.outputs]
        self._axes_in = [spec.batch_axis if spec.batched else None for spec in self._specs]
        self._axes_out = [spec.batch_axis if spec.batched else None for spec in bundle.config.outputs]
        weakref.finalize(self, _release, executor, counter).atexit = False

    def __call__(self, given: Any, named: Mapping[str, Any]) -> Any:
        """Answer one call, and count it; see :meth:`Model.__call__`."""
        counter = self.counter
        if counter is None:
            return self._answer(given, named)
        start = perf_counter_ns()
        try:
            result = self._answer(given, named)
        except BaseException:
            counter.error()
            raise
        counter.record(perf_counter_ns() - start)
        return result

    def _answer(self, given: Any, named: Mapping[str, Any]) -> Any:
        if not named and self._only is not None and given is not None and not isinstance(given, Mapping):
            spec, rank, run = self._only
            array = tensors.as_array(given, spec)
            return run(array) if array.ndim != rank - 1 else run(array[np.newaxis])[0, ...]
        raw = self._by_name(given, named)
        arrays = [tensors.as_array(value, spec) for value, spec in zip(raw, self._specs, strict=True)]
        axes = self._axes_in
        one = all(
            axis is None or array.ndim == len(spec.shape) - 1
            for array, spec, axis in zip(arrays, self._specs, axes, strict=True)
        )
        one = one and any(axis is not None for axis in axes)
        if one:
            arrays = [
                array if axis is None else np.expand_dims(array, axis) for array, axis in zip(arrays, axes, strict=True)
            ]
        results = self._executor.run(arrays)
        if one:
            results = [
                result if axis is None else result.take(0, axis)
                for result, axis in zip(results, self._axes_out, strict=True)
            ]
        return results[0] if len(results) == 1 else dict(zip(self._names, results, strict=True))

    def _by_name(self, given: Any, named: Mapping[str, Any]) -> list[Any]:
        if given is None:
            return self._executor.in_order(named)
        if not isinstance(given, Mapping):
            if len(self._specs) == 1 and not named:
                return [given]
            names = ", ".join(spec.name for spec in self._specs)
            raise InputError(
                "an input was given without its name", remedy=f"Give all inputs by name, as keywords: {names}"
            )
        if both := sorted(set(given) & set(named)):
            raise InputError(f"given twice: {', '.join(both)}")
        return self._executor.in_order({**given, **named})


def _release(executor: Executor, counter: Counter | None) -> None:
    if counter is not None:
        counter.close()
    executor.close()


def _installed(name: str, state: Path) -> slots.ModelFolder:
    there = slots.model_names(state)
    if name not in there:
        if (Path(name) / "oci-layout").is_file():
            remedy = "For a release folder name the target too: Model(folder, target=...)"
        else:
            remedy = f"Installed are: {', '.join(there)}" if there else "Nothing is installed there yet"
        raise InputError(f"no model {name!r} is installed", where=str(state), remedy=remedy)
    return slots.ModelFolder(state, name)


def _mapped(path: Path) -> memoryview:
    """A file of one little-endian 64-bit number, as a view that changes with it. On a big-endian machine it reads
    another number, which serves as well: it is only compared with itself."""
    try:
        with path.open("rb") as file:
            return memoryview(mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)).cast("Q")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"cannot be mapped: {error}", where=str(path), remedy="Let this user read the agent's state folder"
        ) from error


def _load_slot(folder: slots.ModelFolder, generation: int) -> Loaded:
    for attempt in range(_LOAD_ATTEMPTS):
        slot = folder.current()
        if slot is None:
            raise InputError(f"the model {folder.name!r} was taken off this device", where=str(folder.path))
        try:
            bundle = slot.bundle()
            executor = Executor.of(slot.folder, bundle.config, cache=folder.cache)
        except (OSError, KedgeError) as error:
            # The slot may have been replaced and removed while it was read.
            if folder.current() != slot and attempt < _LOAD_ATTEMPTS - 1:
                continue
            if isinstance(error, OSError):
                raise StorageError(
                    f"cannot be read: {error.strerror}",
                    where=str(error.filename or slot.folder),
                    remedy="Let this user read the agent's state folder",
                ) from error
            raise
        return Loaded(bundle, executor, open_counter(folder.counters, digest=bundle.digest, generation=generation))
    raise StorageError("changes faster than it can be loaded", where=str(folder.path))


def _load_release(path: Path, target: str) -> Loaded:
    layout = Layout(path)
    bundle = layout.bundle(target)
    # Blobs have no file names and some runtimes look for a file beside another by name. A runtime keeps open what it
    # needs, so the names may go when it has loaded (as those of a slot may).
    with tempfile.TemporaryDirectory(prefix="kedge-model-") as scratch:
        for title, layer in bundle.files.items():
            source, copy = layout.blob_path(layer.digest), Path(scratch) / title
            try:
                _link_or_copy(source, copy)
            except OSError as error:
                raise BundleError(f"blob {layer.digest}: {error.strerror}", where=str(path)) from error
            digest.verify_file(copy, layer.digest)
        return Loaded(bundle, Executor.of(Path(scratch), bundle.config), None)


def _link_or_copy(source: Path, copy: Path) -> None:
    with contextlib.suppress(OSError):
        copy.hardlink_to(source)
        return
    shutil.copyfile(source, copy)
