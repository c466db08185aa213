"""Chooses the metric of a compilation and computes its value."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.evaluation import decisions, resampling, user
from kedge.evaluation.kinds import ClassifiedOutput, OutputKind
from kedge.evaluation.metrics import Direction, Metric, find
from kedge.evaluation.resampling import Rows
from kedge.evaluation.user import WHERE
from kedge_protocol.errors import ConfigError, DatasetError

Array = npt.NDArray[Any]

USER = "user"
"""Kind of the user's own function."""
OF_ANSWERS = ("top1", "agreement")
"""Kinds that count right and wrong answers."""
_SECONDS = 0.3
"""A function that takes longer is not called for every resample."""
_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The metric of one compilation.

    Attributes:
        kind: a known metric's name (:mod:`kedge.evaluation.metrics`), or :data:`USER`.
        name: as the report and the bundle have it: ``KIND``, ``KIND:OUTPUT`` where the user named one;
            ``file.py:function`` without folders for the user's own.
        output: that is judged; None where all are, or those of ``outputs``.
        outputs: several that are judged each by itself; the worst counts.
        kinds: what each output is.
        inputs: shape of each input's raw samples.
        function: ``path.py:function`` of the user's own.
    """

    kind: str
    name: str
    output: str | None = None
    outputs: tuple[str, ...] = ()
    kinds: tuple[ClassifiedOutput, ...] = ()
    inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    function: str | None = None
    direction: Direction = Direction.HIGHER
    unit: str = ""

    @property
    def seen(self) -> dict[str, ClassifiedOutput]:
        """Return the kind of each output, by name."""
        return {one.name: one for one in self.kinds}

    @property
    def of_answers(self) -> bool:
        """Whether it counts right and wrong answers."""
        return self.kind in OF_ANSWERS

    def metric(self, output: str | None = None) -> Metric:
        """Of a known kind, made anew.

        Args:
            output: one of ``outputs``.
        """
        return find(self.kind, where=WHERE)(output or self.output, self.seen, self.inputs)

    @property
    def averages(self) -> bool:
        """Whether the value is the mean of the rows."""
        return self.kind == USER or not (self.outputs or type(self.metric()).aggregate is not Metric.aggregate)

    def rows(self, outputs: Mapping[str, Array], reference: Mapping[str, Array], labels: Any | None) -> Array | None:
        """What each sample contributes, of a known kind (:meth:`Metric.per_sample`); with several outputs N x outputs
        x that."""
        if not self.outputs:
            return self.metric().per_sample(outputs, reference, labels)
        parts = [self.metric(name).per_sample(outputs, reference, labels) for name in self.outputs]
        return np.stack([part for part in parts if part is not None], axis=1)

    def worst(self, rows: Array) -> int:
        """Which of several outputs has the worst value."""
        values = [self.metric(name).aggregate(rows[:, at]) for at, name in enumerate(self.outputs)]
        return int(np.argmin(values) if self.direction is Direction.HIGHER else np.argmax(values))

    def drop(self, reference: float, value: float) -> float:
        """How much worse than the float model's a value is; below 0 where it is better."""
        return reference - value if self.direction is Direction.HIGHER else value - reference

    def aggregate(self, rows: Array) -> float:
        """The value over rows that :func:`score` gave."""
        if self.kind == USER:
            return float(np.mean(rows, dtype=np.float64))
        if self.outputs:
            rows = rows[:, self.worst(rows)]
        return self.metric().aggregate(rows)


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric value, with the data for its confidence interval.

    Attributes:
        samples: that it is of.
        rows: what each sample contributes; None where the metric has no such form.
        again: the value on each of :func:`kedge.evaluation.resampling.indices`, where there are no rows and that takes
            little time; empty otherwise. None where it has no value.
    """

    value: float
    samples: int = 0
    rows: Rows | None = None
    again: tuple[float | None, ...] = ()


def check(text: str) -> None:
    """Check ``--metric`` before anything is read.

    Raises:
        ConfigError: no such metric; a file or a form that is wrong.
    """
    if user.is_file(text):
        user.check_reference(text)
        return
    kind, colon, output = text.partition(":")
    find(kind, where=WHERE)
    if colon and not output:
        raise ConfigError(f"{text!r} names no output", where=WHERE, remedy="Write KIND or KIND:OUTPUT")


def absolute(text: str | None) -> str | None:
    """Return the metric with an absolute file path, since the worker may have another working directory."""
    return user.absolute(text) if text is not None and user.is_file(text) else text


def named_output(text: str | None) -> str | None:
    """Return the output that ``--metric`` names, if it names one with answers."""
    if text is None or user.is_file(text):
        return None
    kind, _, output = text.partition(":")
    return output or None if kind in ("top1", "top5", "agreement") else None


def choose(
    text: str | None,
    *,
    kinds: Mapping[str, ClassifiedOutput],
    reference: Mapping[str, Array],
    labels: Any | None,
    inputs: Mapping[str, Array] | None = None,
) -> Choice:
    """Decide the metric: what the user asked for. With labels it is top-1 of the output that they fit, R² where they
    are real numbers, and for boxes, masks, several labels of a sample or texts the metric of their kind. Without labels
    it is agreement with the float model's answers where an output has answers, R² of a single number, else the cosine.

    Args:
        text: the ``--metric`` option.
        kinds: what each output is.
        reference: the float model's answers, in its order.
        inputs: raw samples, by name.

    Raises:
        DatasetError: labels that no output fits.
        ConfigError: a metric that suits no output, or an output that is not there.
    """
    told = tuple(kinds.values())
    shapes = {name: tuple(array.shape) for name, array in (inputs or {}).items()}
    if text is not None and user.is_file(text):
        path, _, function = text.rpartition(":")
        return Choice(kind=USER, name=f"{Path(path).name}:{function}", function=text, kinds=told)
    if text is not None:
        kind, _, output = text.partition(":")
        return _known(kind, output or None, kinds, reference, labels, shapes)
    return _known(usual(kinds, reference, labels), None, kinds, reference, labels, shapes)


def usual(kinds: Mapping[str, ClassifiedOutput], reference: Mapping[str, Array], labels: Any | None) -> str:
    """Return the kind of metric where the user names none; see :func:`choose`."""
    return _without_labels(kinds) if labels is None else _with_labels(kinds, reference, labels)


def _with_labels(kinds: Mapping[str, ClassifiedOutput], reference: Mapping[str, Array], labels: Any) -> str:
    top1 = find("top1", where=WHERE)
    if any(top1.suits(seen, reference[name], labels) for name, seen in kinds.items()):
        return "top1"
    if isinstance(labels, np.ndarray) and any(_are_values(labels, reference[n], seen) for n, seen in kinds.items()):
        return "r2"
    for kind in _BY_LABELS:
        if any(find(kind, where=WHERE).suits(seen, reference[name], labels) for name, seen in kinds.items()):
            return kind
    raise _misfit(kinds, reference, labels)


_BY_LABELS = ("map", "multilabel-f1", "miou", "cer")
"""What labels that are no classes may be of, in this order."""


def _misfit(kinds: Mapping[str, ClassifiedOutput], reference: Mapping[str, Array], labels: Any) -> Exception:
    """Describe why the labels fit no output, for the first output that may hold scores."""
    from kedge.evaluation.metrics.classes import Top1

    names = [n for n, one in kinds.items() if one.kind not in (OutputKind.PASSED_THROUGH, OutputKind.INTEGERS)]
    names.sort(key=lambda name: kinds[name].kind is not OutputKind.CLASSES)
    name = (names or list(kinds))[0]
    try:
        Top1(name, kinds).check(reference, labels, where="evaluation")
    except DatasetError as error:
        return error
    return DatasetError(
        "the labels fit no output", where="evaluation", remedy="Give your own --metric file.py:function"
    )


_SINGLE = (OutputKind.NUMBER, OutputKind.PROBABILITY)


def _are_values(labels: Array, output: Array, seen: ClassifiedOutput) -> bool:
    """Return whether labels are what an output should give: numbers for one with a single number (real ones for a
    probability), or several numbers in the output's shape, which 0 and 1 for each class are not."""
    if seen.kind in _SINGLE:
        return labels.dtype.kind in ("iuf" if seen.kind is OutputKind.NUMBER else "f") and output.size == labels.size
    several = seen.kind is OutputKind.VALUES and output.ndim == 2 and labels.shape == output.shape
    return several and labels.dtype.kind in "iuf" and not np.isin(labels, (0, 1)).all()


def _without_labels(kinds: Mapping[str, ClassifiedOutput]) -> str:
    judged = [one.kind for one in kinds.values() if one.kind is not OutputKind.PASSED_THROUGH]
    if any(kind in decisions.ANSWERS for kind in judged):
        return "agreement"
    if judged and all(kind in (OutputKind.INTEGERS, OutputKind.EMPTY) for kind in judged):
        return "agreement" if OutputKind.INTEGERS in judged else "cosine"
    return "r2" if judged.count(OutputKind.NUMBER) == 1 and len(judged) == 1 else "cosine"


def _described(labels: Any) -> str:
    found = np.asarray(labels)
    kind = {"f": "real numbers", "U": "texts"}.get(found.dtype.kind, "whole numbers")
    return f"{kind} {list(found.shape)}"


def _known(
    kind: str,
    output: str | None,
    kinds: Mapping[str, ClassifiedOutput],
    reference: Mapping[str, Array],
    labels: Any | None,
    inputs: Mapping[str, tuple[int, ...]],
) -> Choice:
    metric = find(kind, where=WHERE)
    if metric.needs_labels and labels is None:
        raise ConfigError(
            f"{kind} needs labels, the evaluation set has none",
            where=WHERE,
            remedy="Store them as `label`, or give --annotations",
        )
    if output is not None and output not in kinds:
        raise ConfigError(f"the model has no output {output!r}", where=WHERE, remedy=f"It has {', '.join(kinds)}")
    judged: tuple[str, ...] = () if output is None else (output,)
    if output is None and not metric.whole:
        judged = _suiting(metric, kinds, reference, labels)
        if not judged:
            there = "; ".join(
                f"{name} {list(reference[name].shape)} is {one.kind.value}" for name, one in kinds.items()
            )
            have = "" if labels is None else f"; labels are {_described(labels)}"
            raise ConfigError(
                f"no output is known to be one that {kind} judges: {there}{have}",
                where=WHERE,
                remedy=f"Name the output: --metric {kind}:{next(iter(kinds))}"
                + (", and look whether the labels fit it" if have else ""),
            )
    for name in judged or (None,):
        metric(name, kinds, inputs).check(reference, labels, where="evaluation")
    return Choice(
        kind=kind,
        name=kind if output is None else f"{kind}:{output}",
        output=judged[0] if len(judged) == 1 else None,
        outputs=judged if len(judged) > 1 else (),
        kinds=tuple(kinds.values()),
        inputs=dict(inputs),
        direction=metric.direction,
        unit=metric.unit,
    )


def _suiting(
    metric: type[Metric], kinds: Mapping[str, ClassifiedOutput], reference: Mapping[str, Array], labels: Any | None
) -> tuple[str, ...]:
    """Return the outputs that a metric judges where the user names none: all that suit it where the float model's
    answers are what is right, else the one that the labels are of, which is the one that is nearest to them."""
    names = [name for name, seen in kinds.items() if metric.suits(seen, reference[name], labels)]
    # What is read off other outputs, as a label beside its scores, counts where there is nothing else.
    names = [name for name in names if kinds[name].kind is not OutputKind.INTEGERS] or names
    if len(names) < 2 or metric.against_float or (labels is None and not metric.needs_labels):
        return tuple(names)
    if labelled := [name for name in names if kinds[name].labelled]:
        return (labelled[0],)
    values = [metric(name, kinds).value(reference, reference, labels) for name in names]
    best = np.argmax(values) if metric.direction is Direction.HIGHER else np.argmin(values)
    return (names[int(best)],)


def score(
    choice: Choice,
    outputs: Mapping[str, Array],
    reference: Mapping[str, Array],
    inputs: Mapping[str, Array],
    labels: Any | None,
) -> Score:
    """Compute the metric.

    Args:
        outputs: output name → answers, first axis the sample.
        reference: of the float model, likewise.
        inputs: raw samples.
        labels: as the user gave them.

    Raises:
        ConfigError: the user's function is not there, raises, or gives no finite number.
    """
    if choice.kind == USER:
        return _users(choice, outputs, inputs, labels)
    rows = choice.rows(outputs, reference, labels)
    if rows is not None:
        return Score(value=choice.aggregate(rows), samples=len(rows), rows=Rows.of(rows))
    metric = choice.metric()

    def value(picked: Array) -> float:
        return metric.value(_picked(outputs, picked), _picked(reference, picked), _rows(labels, picked))

    began = time.monotonic()
    whole = metric.value(outputs, reference, labels)
    return Score(value=whole, samples=_count(outputs), again=_again(value, whole, outputs, time.monotonic() - began))


def _users(choice: Choice, outputs: Mapping[str, Array], inputs: Mapping[str, Array], labels: Any) -> Score:
    function = user.load(choice.function or "")
    began = time.monotonic()
    made = user.call(function, outputs, inputs, labels, name=choice.name)
    if made.ndim:
        return Score(value=float(np.mean(made)), samples=len(made), rows=Rows.of(made))

    def value(picked: Array) -> float:
        return float(
            user.call(
                function, _picked(outputs, picked), _picked(inputs, picked), _rows(labels, picked), name=choice.name
            )
        )

    whole = float(made)
    return Score(value=whole, samples=_count(outputs), again=_again(value, whole, outputs, time.monotonic() - began))


def _again(
    value: Callable[[Array], float], whole: float, outputs: Mapping[str, Array], seconds: float
) -> tuple[float | None, ...]:
    """The value on every resample; none at all where that would take long, or where it fails on some samples."""
    if seconds > _SECONDS or sum(array.nbytes for array in outputs.values()) > _BYTES:
        return ()
    count = _count(outputs)
    turned = _tried(value, np.arange(count)[::-1])
    if turned is None or not np.isclose(turned, whole, rtol=1e-6, atol=1e-12):
        return ()  # it knows its samples by their places
    return tuple(_tried(value, picked) for picked in resampling.indices(count))


def _tried(value: Callable[[Array], float], picked: Array) -> float | None:
    try:
        made = float(value(picked))
    except (ConfigError, ArithmeticError, ValueError):
        return None
    return made if np.isfinite(made) else None


def _count(arrays: Mapping[str, Array]) -> int:
    return len(next(iter(arrays.values())))


def _picked(arrays: Mapping[str, Array], picked: Array) -> dict[str, Array]:
    return {name: np.asarray(array[picked]) for name, array in arrays.items()}


def _rows(labels: Any, picked: Array) -> Any:
    return None if labels is None else labels[picked]
