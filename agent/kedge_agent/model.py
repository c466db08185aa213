"""The entry point for applications: a model as a function in their own process."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, overload

from kedge_protocol.errors import InputError, KedgeError

if TYPE_CHECKING:
    from kedge_agent import slots
    from kedge_agent.call_cache import CallCache
    from kedge_agent.generation.generator import Answer, AnswerStream
    from kedge_agent.loaded import Loaded
    from kedge_agent.session import Session
    from kedge_protocol.bundle.config import BundleConfig, TensorSpec
    from kedge_protocol.bundle.layout import Bundle
    from kedge_targets.pipeline.cascades import CascadeCounts

log = logging.getLogger("kedge.model")


class Model:
    """A model that can be called.

    Args:
        source: name of a model that the fleet installed; with ``target``, a release folder (``kedge compile -o``).
        target: which bundle of the release folder.
        backend: which of the bundles for ``target``, if the folder holds several (``--every-backend``); by default each
            is proved and measured on this machine the first time, for some seconds, and the better one is taken.
        state: the agent's state folder; by default ``KEDGE_STATE``, then the system's (see
            :func:`kedge_agent.slots.default_state`).
        cache_mib: memory for answers that are kept and given again to calls with the same input, see
            :attr:`cache`; 0 keeps none.
        others: models to which the bundle's pipeline passes results, by name; those installed on the device are found
            automatically.

    An installed model follows the fleet: after a switch, the new bundle is loaded in the background and takes over
    between two calls; running calls finish on the old one. If memory has no room for both, the old one finishes and is
    released first, and calls wait meanwhile. If the new one cannot be loaded, the old one goes on and :attr:`failure`
    says why.

    Raises:
        InputError: there is no such model or folder.
        BundleError: the release folder is damaged, or has no bundle for ``target``.
        MissingDependencyError: the bundle's runtime is not installed.
        VerificationError: the runtime refuses the file.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        *,
        target: str | None = None,
        backend: str | None = None,
        state: str | os.PathLike[str] | None = None,
        others: Mapping[str, Model] | None = None,
        cache_mib: float = 0,
    ) -> None:
        # Importing this module is cheap; numpy, the bundle's format and the runtime come with the first model.
        from kedge_agent import loading

        self._others: dict[str, Model] = dict(others or {})
        self._cache: CallCache | None = None
        if cache_mib > 0:
            from kedge_agent.call_cache import CallCache

            self._cache = CallCache(int(cache_mib * (1 << 20)))
        self._folder: slots.ModelFolder | None = None
        self._generation: memoryview | None = None
        self._seen = 0
        self._held = False
        self._reloading = threading.Lock()
        self._failure: Exception | None = None
        self._failed_loads = 0
        self._loaded: Loaded | None
        if target is not None:
            if state is not None:
                raise InputError("a release folder has no state folder", remedy="Leave out `state` or `target`")
            self._loaded = self._cached(loading.load_release(Path(source), target, backend))
        else:
            if backend is not None:
                raise InputError("an installed model has one backend", remedy="Leave out `backend`, or give `target`")
            self._folder = loading.installed(str(source), None if state is None else Path(state))
            self._generation = loading.mapped(self._folder.generation_file)
            self._seen = self._generation[0]
            self._loaded = self._cached(loading.load_slot(self._folder, self._seen))

    def __call__(self, array: Any = None, /, **named: Any) -> Any:
        """Answer raw data by the bundle's pipeline: a picture (a path, the bytes of a file, a Pillow image, a uint8
        array height x width x 3), a sound (a path or the bytes of a wav file, samples, ``(samples, rate)``) or a text,
        or a list of them; without a pipeline, the same as :meth:`raw`. A model of speech (Whisper) takes a sound, and
        as keywords ``language``, ``task``, ``temperature`` and ``seed``.

        Returns:
            Labels, boxes, a text, a vector or segments (:mod:`kedge_targets.pipeline.answers`), or a list of these;
            :func:`kedge_targets.pipeline.answers.to_json` converts them to plain data. Of a model of speech a
            :class:`kedge_agent.generation.transcription.Transcript`.

        Raises:
            InputError: the pipeline does not take the data, or the model is closed; see :meth:`raw`.
            MissingDependencyError: a package that the pipeline needs is not installed.
        """
        # As in loaded(), whose call alone is a quarter of what this adds to a small model.
        generation, loaded = self._generation, self._loaded
        if loaded is None or (generation is not None and generation[0] != self._seen):
            loaded = None  # held here, it could not make way for the next
            loaded = self.loaded()
        if loaded.pipeline is None:
            return loaded.call(loaded, array, named)
        if named or isinstance(array, Mapping):
            raise InputError("the pipeline takes one item, not tensors by name", remedy="Give tensors to Model.raw")
        pipeline = loaded.pipeline
        if self._cache is not None:
            return self._cache.piped(loaded, array, lambda: pipeline(array, loaded.named, other=self.other))
        return pipeline(array, loaded.named, other=self.other)

    async def call_async(self, array: Any = None, /, **named: Any) -> Any:
        """Run :meth:`__call__` in a thread, so that asyncio's event loop is not blocked."""
        import asyncio

        return await asyncio.to_thread(self, array, **named)

    def stream(self, items: Iterable[Any]) -> Iterator[Any]:
        """Answer one item after another, in order, for a bundle with a pipeline: while the model computes, the next
        item is prepared and the last answer finished.

        Raises:
            InputError: the bundle has no pipeline; see :meth:`__call__`.
        """
        from kedge_targets.pipeline import stages

        loaded = self.loaded()
        if loaded.pipeline is None:
            raise InputError("the bundle has no pipeline", remedy="Compile it with --task or --pipeline")
        return stages.overlapped(items, loaded.pipeline, loaded.named, other=self.other)

    def raw(self, array: Any = None, /, **named: Any) -> Any:
        """Run the bare model, without the pipeline, on raw samples (as they are before the bundle's preprocessing).

        Args:
            array: samples of the only input with the batch as first axis, or one sample without it; then the result has
                none either. For several inputs, a mapping by name, or keywords.

        Returns:
            The only output as an array of real numbers, or a dictionary by name.

        Raises:
            InputError: an input is missing or unknown, or has a wrong shape or dtype; or the model is closed.
        """
        loaded = self.loaded()
        return loaded.call(loaded, array, named)

    def other(self, name: str) -> Callable[[Any], Any]:
        """Return another model of this device, to which a pipeline passes its results."""
        if name not in self._others:
            if self._folder is None:
                raise InputError(
                    f"the pipeline goes on to the model {name!r}",
                    remedy=f"Give Model(..., others={{{name!r}: Model(...)}})",
                )
            self._others[name] = Model(name, state=self._folder.state)
        return self._others[name]

    @overload
    def generate(
        self, prompt: str | Sequence[Mapping[str, Any]], *, stream: Literal[False] = False, **options: Any
    ) -> Answer: ...

    @overload
    def generate(
        self, prompt: str | Sequence[Mapping[str, Any]], *, stream: Literal[True], **options: Any
    ) -> AnswerStream: ...

    def generate(
        self, prompt: str | Sequence[Mapping[str, Any]], *, stream: bool = False, **options: Any
    ) -> Answer | AnswerStream:
        """Write text with a language model.

        Args:
            prompt: a text to continue, or to translate with an encoder-decoder; or messages (``[{"role": "user",
                "content": "…"}]``) for the model's chat template.
            stream: return immediately, with an iterator over pieces of text as they come, for ``for`` and ``async
                for``.
            options: ``max_tokens`` of the answer (default 200; fewer if the context ends earlier); ``temperature``,
                ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``seed``, see
                :class:`kedge_agent.generation.sampling.Sampling`; ``stop``, one or several texts that end the answer
                and are not part of it; ``log_probabilities``, the number of alternatives returned with each token;
                ``seconds`` after which the answer is cut off; ``ignore_end`` to continue after an end token. One of
                ``json_schema`` (a schema, or True for any JSON object), ``regex`` and ``grammar`` (Lark), which the
                whole answer matches unless it ends before (needs the ``structured`` extra). An encoder-decoder takes
                ``task``, whose prefix is put before the text, and ``language``, into which it is translated.

        Raises:
            InputError: the model is not a language model, the prompt is empty or longer than the context, the template
                refuses the messages, an option is out of range, or the model is closed.
        """
        found = self.loaded().write(prompt, options, whole=not stream)
        return found if stream else found.finish()

    def session(self, **states: Any) -> Session:
        """Open a session: a sequence of calls of a model with states, which are carried from call to call.

        Args:
            states: states for the first call, by input name; zeros by default.

        Raises:
            InputError: the model has no states, or none with this name.
        """
        from kedge_agent.session import Session

        return Session(self, states)

    def loaded(self) -> Loaded:
        """Return the bundle that answers now. Its properties belong to its answers, even if the model switches
        meanwhile.

        Raises:
            InputError: the model is closed.
        """
        generation = self._generation
        if generation is not None and generation[0] != self._seen and not self._held:
            self._reload_in_background()
        loaded = self._loaded
        if loaded is None and self._generation is not None:
            with self._reloading:  # it was released to make room for the one that is being loaded
                loaded = self._loaded
        if loaded is None:
            why = "the model was closed" if self._generation is None else f"no version is loaded: {self._failure}"
            raise InputError(why)
        return loaded

    @property
    def digest(self) -> str:
        """Return the digest of the bundle that answers."""
        return self._bundle.digest

    @property
    def config(self) -> BundleConfig:
        """Return the bundle's configuration."""
        return self._bundle.config

    @property
    def name(self) -> str:
        """Return the model's name."""
        return self.config.name

    @property
    def version(self) -> str:
        """Return the release's version."""
        return self.config.version

    @property
    def labels(self) -> tuple[str, ...]:
        """Return class names in the order of the output's last axis; empty if there are none."""
        return self.config.labels

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Return the specifications of the inputs, in order."""
        return self.config.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Return the specifications of the outputs, in order."""
        return self.config.outputs

    @property
    def detail(self) -> str:
        """Return a description of what runs the model here; empty if the runtime's name says it all."""
        loaded = self._loaded
        return "" if loaded is None else loaded.detail

    @property
    def figures(self) -> Mapping[str, float]:
        """Return figures that the runtime measured on this device, by name with unit; usually empty."""
        loaded = self._loaded
        return {} if loaded is None else loaded.figures

    @property
    def cascade(self) -> CascadeCounts | None:
        """Return how many items went to the pipeline's larger model, and what became of them; None if it has none."""
        loaded = self._loaded
        return None if loaded is None else loaded.cascade

    @property
    def cache(self) -> CallCache | None:
        """Return the answers that are kept, with their hits and misses; None without ``cache_mib``."""
        return self._cache

    @property
    def failure(self) -> Exception | None:
        """Return why the installed bundle is not the one that answers, or None if it is."""
        return self._failure

    @property
    def failed_loads(self) -> int:
        """Return the number of bundles that failed to load at a switch."""
        return self._failed_loads

    def hold(self) -> None:
        """Follow the fleet at :meth:`refresh` alone from now on."""
        self._held = True

    def refresh(self) -> None:
        """Load the installed bundle beside the old one if it is a different one, and wait for it; see :attr:`failure`
        for the outcome."""
        with self._reloading:
            self._reload()

    def close(self) -> None:
        """Release the model. Running calls finish; later ones fail."""
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
        return self.loaded().bundle

    def _cached(self, loaded: Loaded) -> Loaded:
        return loaded if self._cache is None else self._cache.around(loaded)

    def _reload_in_background(self) -> None:
        if not self._reloading.acquire(blocking=False):
            return

        def work() -> None:
            try:
                self._reload(makes_room=True)
            finally:
                self._reloading.release()

        try:
            threading.Thread(target=work, name="kedge-reload", daemon=True).start()
        except RuntimeError:
            # No thread to be had; a later call tries again.
            self._reloading.release()

    def _reload(self, *, makes_room: bool = False) -> None:
        """Load until the loaded bundle is the installed one; the caller holds the lock.

        Args:
            makes_room: whether the old one is released before, if memory has no room for both.
        """
        from kedge_agent import loading

        folder = self._folder
        while folder is not None and (view := self._generation) is not None and view[0] != self._seen:
            generation = view[0]
            try:
                slot = folder.current()
                before = self._loaded
                if before is None or slot is None or slot.digest != before.bundle.digest:
                    if makes_room and before is not None and slot is not None and loading.crowded(slot, before):
                        old, leaving = before.digest, before.retire(makes_room=True)
                        del before
                        self._exchange(folder, generation, old, leaving)
                    else:
                        self._loaded = self._cached(loading.load_slot(folder, generation))
                        if before is not None:
                            before.retire()
                self._failure = None
            except KedgeError as error:
                log.error("%s: the new bundle cannot be loaded, the old one goes on: %s", folder.name, error)
                self._note_failure(error)
            except Exception as error:
                # Whatever else a runtime may raise: the old bundle goes on.
                log.exception("%s: the new bundle cannot be loaded, the old one goes on", folder.name)
                self._note_failure(error)
            self._seen = generation

    def _exchange(self, folder: slots.ModelFolder, generation: int, old: str, leaving: weakref.ref[Any]) -> None:
        """Load the installed bundle in the place of one that makes way for it; if that fails, the old one again.

        Args:
            old: digest of the old one.
            leaving: see :meth:`Loaded.retire`.
        """
        from kedge_agent import loading

        self._loaded = None
        loading.wait_until_gone(leaving)
        try:
            self._loaded = self._cached(loading.load_slot(folder, generation))
        except Exception:
            self._loaded = self._cached(loading.load_slot(folder, generation, instead=folder.slot(old)))
            raise

    def _note_failure(self, error: Exception) -> None:
        self._failure = error
        self._failed_loads += 1
        if self._loaded is not None and self._loaded.counter is not None:
            self._loaded.counter.error()


def __getattr__(name: str) -> Any:
    if name == "Loaded":
        from kedge_agent.loaded import Loaded

        return Loaded
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
