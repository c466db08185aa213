"""A loaded bundle, which answers the calls of a :class:`kedge_agent.model.Model`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from kedge_agent import room
from kedge_agent.counters import Counter
from kedge_agent.observing import NEVER, Observer
from kedge_protocol import tensors
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.errors import InputError
from kedge_targets.calls import plan as call_plan
from kedge_targets.executor import Executor

if TYPE_CHECKING:
    from kedge_agent.generation.generator import AnswerStream, TextGenerator
    from kedge_agent.generation.transcription import Transcript
    from kedge_agent.paces import Paces
    from kedge_agent.split.holder import PartHolder
    from kedge_targets.pipeline.cascades import CascadeCounts
    from kedge_targets.pipeline.execution import Runner

Array = npt.NDArray[Any]


log = logging.getLogger("kedge.model")

_MOST_THREADS = 32
"""Threads that wait for their calls to be gathered cost memory, of which a device has little."""


class Loaded:
    """A bundle ready for calls. It is released after the last call that uses it."""

    def __init__(
        self,
        bundle: Bundle,
        executor: Executor | TextGenerator | PartHolder,
        counter: Counter | None,
        pipeline: Runner | None = None,
        observer: Observer | None = None,
        paces: Paces | None = None,
    ) -> None:
        self.bundle = bundle
        self.pipeline = pipeline
        """The pipeline from raw data to answers; None if the bundle has none."""
        self.counter = counter
        self.detail = executor.detail
        self.figures = executor.figures
        self.plan = executor.plan if isinstance(executor, Executor) else None
        """How calls are run, as chosen on this device; None where nothing was."""
        self.threads = _threads(bundle, executor)
        """How many threads may call it to good purpose."""
        self.taken = {
            spec.name: None if spec.preprocess is not None else np.dtype(spec.dtype) for spec in bundle.config.inputs
        }
        """Input → the dtype that it takes; None where its preprocessing takes numbers of any."""
        self._executor = executor
        self._specs = bundle.config.inputs
        only = executor.one
        self._only = None if only is None else (self._specs[0], len(self._specs[0].shape), only)
        one = None if only is None else (self._specs[0].name, len(self._specs[0].shape), only)
        self._observer = observer
        self._paces = paces
        self._due = [NEVER] if observer is None else observer.due
        self.call = _caller(one, counter, self._due)
        """As calling this object, with the object as first argument."""
        self._names = [spec.name for spec in bundle.config.outputs]
        self._axes_in = [spec.batch_axis if spec.batched else None for spec in self._specs]
        self._axes_out = [spec.batch_axis if spec.batched else None for spec in bundle.config.outputs]
        weakref.finalize(self, _release, executor, counter, observer, paces).atexit = False

    def __call__(self, given: Any, named: Mapping[str, Any]) -> Any:
        """Answer one call and count it; see :meth:`Model.__call__`."""
        return self.call(self, given, named)

    def named(self, raw: Mapping[str, Any]) -> dict[str, Array]:
        """Run the bare model and count the call: input name → samples with a batch axis, to output name → answers."""
        start = perf_counter_ns()
        try:
            result = self._executor(raw)
        except BaseException:
            if self.counter is not None:
                self.counter.error()
            raise
        if self.counter is not None:
            ended = perf_counter_ns()
            self.counter.record(ended - start)
            if ended > self._due[0]:
                self.observe(None, raw, result, ended - start)
        return result

    def observe(self, given: Any, named: Mapping[str, Any], result: Any, nanoseconds: int) -> None:
        """Look at an answered call, whose turn it is.

        Args:
            given, named: as of :meth:`Model.__call__`.
            result: the answer.
            nanoseconds: how long it took.
        """
        if self._observer is None:
            return
        raw = self._by_name(given, named)
        inputs = {spec.name: tensors.as_array(one, spec) for spec, one in zip(self._specs, raw, strict=True)}
        self._observer.look(inputs, result if isinstance(result, dict) else {self._names[0]: result}, nanoseconds)

    @property
    def version(self) -> str:
        """Return the release's version. It belongs to every answer of this object, whatever the model is switched to
        meanwhile."""
        return self.bundle.config.version

    @property
    def digest(self) -> str:
        """Return the bundle's digest."""
        return self.bundle.digest

    @property
    def cascade(self) -> CascadeCounts | None:
        """Return what became of the items of a pipeline with a larger model; None if it has none."""
        if self.pipeline is None:
            return None
        from kedge_targets.pipeline.cascades import CascadeRunner

        return self.pipeline.gate.counts if isinstance(self.pipeline, CascadeRunner) else None

    @property
    def gathered_sizes(self) -> Mapping[int, tuple[int, int]]:
        """Number of samples → how many calls of the runtime had so many, and their nanoseconds together; empty where
        calls are not gathered."""
        return self._executor.gathered_sizes if isinstance(self._executor, Executor) else {}

    @property
    def generator(self) -> TextGenerator:
        """Return the text generator.

        Raises:
            InputError: the model is not a language model.
        """
        config = self.bundle.config
        if config.generation is None or isinstance(self._executor, Executor):
            raise InputError("writes no text", where=config.name, remedy="Call the model with arrays")
        if not config.generation.writes:
            raise self._executor.refusal()
        return cast("TextGenerator", self._executor)

    def retire(self, *, makes_room: bool = False) -> weakref.ref[Any]:
        """Give way to another version: calls finish, and a language model's answers within
        :data:`kedge_agent.room.SWITCH_SECONDS`. Return a reference that is dead once nothing uses the bundle any more.

        Args:
            makes_room: whether the other version is loaded only then.
        """
        spec = self.bundle.config.generation
        if spec is None or isinstance(self._executor, Executor):
            return weakref.ref(self)
        if spec.writes:
            self.generator.engine.retire(room.SWITCH_SECONDS)
            return weakref.ref(self)
        part = cast("PartHolder", self._executor)
        if makes_room:
            part.make_room()
        return weakref.ref(part)

    def write(
        self, prompt: str | Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, whole: bool = False
    ) -> AnswerStream:
        """Start an answer; see :meth:`Model.generate`, and for ``whole``
        :meth:`kedge_agent.generation.generator.TextGenerator.stream`."""
        from kedge_agent.generation.constraint import from_options
        from kedge_agent.generation.generator import check_options
        from kedge_agent.generation.sampling import split

        sampling, others = split(options)
        constraint, others = from_options(others)
        try:
            tokens, others = self.generator.prepared(prompt, others)
            check_options(others)
            return self.begin(tokens, sampling=sampling, constraint=constraint, whole=whole, **others)
        except TypeError as error:
            raise InputError(f"an option is not known or of another type: {error}", where="generate") from error

    def begin(self, tokens: Sequence[int], *, counted: bool = True, **options: Any) -> AnswerStream:
        """Start an answer to tokens, and count it when it ends unless ``counted`` is False. The options are those of
        :meth:`kedge_agent.generation.generator.TextGenerator.stream`."""
        start = perf_counter_ns()

        def ended(failed: bool) -> None:
            # The stream holds this function, and so the bundle, until its end.
            if (counter := self.counter) is None or not counted:
                return
            if failed:
                counter.error()
                return
            counter.record(perf_counter_ns() - start)
            answered = stream()
            if self._paces is not None and answered is not None:
                self._paces.record(answered.pace)

        begun = self.generator.stream(tokens, ended=ended, **options)
        # The stream must not hold itself: it is released with its last user.
        stream = weakref.ref(begun)
        return begun

    def answer(self, given: Any, named: Mapping[str, Any]) -> Any:
        """Answer a call in any of its forms, without counting it."""
        if not isinstance(self._executor, Executor):
            return self._heard(self.generator, given, named)
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

    def _heard(self, generator: TextGenerator, given: Any, options: Mapping[str, Any]) -> Transcript:
        """Write down what is said in a sound; see :func:`kedge_agent.generation.transcription.transcribe`."""
        from kedge_agent.generation.transcription import transcribe

        try:
            return transcribe(generator, given, **options)
        except TypeError as error:
            where = self.bundle.config.name
            raise InputError(f"an option is not known or of another type: {error}", where=where) from error

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


def _threads(bundle: Bundle, executor: Executor | TextGenerator | PartHolder) -> int:
    """Return how many threads may call a bundle: as many as calls run at once by its plan, and more where those that
    wait are gathered; without a plan as many as have cores for the threads that the bundle asks for (``threads`` in its
    runtime options; all cores by default), and one if its runtime runs one call at a time."""
    if not isinstance(executor, Executor):
        return 1
    plan = executor.plan
    if plan is not None:
        # One group is under way on each of the runtime's, and the next gathers.
        return max(plan.at_once, min(2 * plan.at_once * plan.most, _MOST_THREADS) if plan.most > 1 else 1)
    cores = call_plan.cores()
    threads = bundle.config.runtime_options.get("threads", 0)
    known = isinstance(threads, int) and 0 < threads <= cores
    return cores // threads if executor.concurrent and known else 1


def _caller(
    one: tuple[str, int, Callable[[Array], Array]] | None, counter: Counter | None, due: list[int]
) -> Callable[[Loaded, Any, Mapping[str, Any]], Any]:
    """Return a function that answers a call. Everything is bound to it: looking it up would cost a small model a tenth
    of its time. It does not hold the bundle, which is released after its last call.

    Args:
        one: name and rank of the only input, and the function that computes the only output; None for other models.
        due: time after which the next call is looked at.
    """
    name, rank, run = one or ("", -1, _no_run)
    kind, clock = np.ndarray, perf_counter_ns

    def uncounted(loaded: Loaded, given: Any, named: Mapping[str, Any]) -> Any:
        array = given
        if named:
            array = named.get(name) if given is None and len(named) == 1 else None
        elif given.__class__ is dict:
            array = given.get(name) if len(given) == 1 else None
        if array.__class__ is kind and array.ndim == rank:
            return run(array)
        return loaded.answer(given, named)

    if counter is None:
        return uncounted
    record, error = counter.record, counter.error

    # It picks the array as above: a call of a shared function would cost as much as the counting.
    def counted(loaded: Loaded, given: Any, named: Mapping[str, Any]) -> Any:
        array = given
        if named:
            array = named.get(name) if given is None and len(named) == 1 else None
        elif given.__class__ is dict:
            array = given.get(name) if len(given) == 1 else None
        start = clock()
        try:
            result = run(array) if array.__class__ is kind and array.ndim == rank else loaded.answer(given, named)
        except BaseException:
            error()
            raise
        ended = clock()
        record(ended - start)
        if ended > due[0]:
            loaded.observe(given, named, result, ended - start)
        return result

    return counted


def _no_run(array: Array) -> Array:
    raise InputError("the model has several inputs or outputs")


def warm_up(executor: Executor | TextGenerator | PartHolder) -> None:
    """Call a model once with zeros, so that memory and kernels are ready for an application's first call. The result
    does not matter, nor does a refusal."""
    if not isinstance(executor, Executor):
        return
    zeros = [np.zeros([axis or 1 for axis in spec.shape], spec.dtype) for spec in executor.inputs]
    try:
        executor.run(zeros)
    except Exception:
        log.debug("the model does not take zeros", exc_info=True)


def _release(
    executor: Executor | TextGenerator | PartHolder,
    counter: Counter | None,
    observer: Observer | None,
    paces: Paces | None,
) -> None:
    for one in (observer, counter, paces):
        if one is not None:
            one.close()
    executor.close()
