"""Repair by training, from the options to the trained network, as the steps ``distil`` and ``fine-tune`` share it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx

from kedge.step import Context
from kedge.training import distillation, loop
from kedge.training.checkpoint import Checkpoint
from kedge.training.distillation import Distillation, Terms
from kedge.training.network import Hook, Network
from kedge.training.options import TrainingOptions
from kedge.training.samples import Pool
from kedge_protocol.errors import ConfigError

_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_RATE_OF_CONVOLUTIONS = 1e-3
_RATE_OF_TRANSFORMERS = 2e-4
_HARD_SHARE = 0.3
_TEMPERATURE = 4.0
_FEW = 20


def check(options: TrainingOptions, where: str) -> None:
    """Check the numbers.

    Raises:
        ConfigError: a number is out of range.
    """
    hard = options.hard_weight
    wrong = {
        "steps must be 1 or more": options.steps < 1,
        "learning_rate must be above 0": options.learning_rate is not None and not options.learning_rate > 0,
        "temperature must be above 0": options.temperature is not None and not options.temperature > 0,
        "hard_weight must be from 0 to 1": hard is not None and not 0 <= hard <= 1,
        "attention_weight must not be below 0": not options.attention_weight >= 0,
        "feature_weight must not be below 0": options.feature_weight is not None and not options.feature_weight >= 0,
        "batch must be 1 or more": options.batch < 1,
        "patience must be 1 or more": options.patience < 1,
        "held_back must be from 0 to 0.9": not 0 <= options.held_back <= 0.9,
        "weight_decay must not be below 0": not options.weight_decay >= 0,
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ConfigError(what, where=where, remedy="Change the recipe")


def trained(
    model: onnx.ModelProto,
    context: Context,
    options: TrainingOptions,
    *,
    what: str,
    hooks: Mapping[str, Hook] | None = None,
    usual_rate: float | None = None,
    other: bool = False,
    layers: tuple[str, ...] = (),
) -> Network:
    """Train a network and return it in the best state found; figures and notes go to the context.

    Args:
        usual_rate: the learning rate if the options give none; if None, it depends on the kind of network.
        hooks: see :class:`kedge.training.network.Network`; for the student only.
        other, layers: of a teacher that is another model, see :class:`kedge.training.distillation.Terms`.
    """
    pool = Pool(context.samples, context.labels, held_back=options.held_back, seed=context.seed)
    student, teacher = Network(model, hooks), Network(context.teacher)
    teacher.requires_grad_(False)
    objective = Distillation(
        student,
        teacher,
        pool,
        _terms(options, context, other=other, layers=layers),
        one_by_one=context.fixed_batch,
        loss=context.loss,
    )
    parameters = [*student.parameters(), *objective.projections]
    schedule = loop.Schedule(
        steps=options.steps,
        learning_rate=options.learning_rate or usual_rate or _usual_rate(model),
        batch=min(options.batch, len(pool.training)),
        patience=options.patience,
        weight_decay=options.weight_decay,
        seed=context.seed,
    )
    checkpoint = None
    if context.checkpoints is not None:
        checkpoint = Checkpoint(
            context.checkpoints,
            what,
            model.SerializeToString(deterministic=True),
            context.teacher.SerializeToString(deterministic=True),
            pool.digest(),
            repr((options, schedule, context.plan, context.fixed_batch)),
            "" if context.loss is None else _text(context.loss),
        )
    outcome = loop.train(
        parameters,
        objective,
        schedule,
        what=what,
        checkpoint=checkpoint,
        seconds=context.seconds,
        progress=context.progress,
    )
    _note_result(context, what, pool, outcome)
    return student


def _terms(options: TrainingOptions, context: Context, *, other: bool, layers: tuple[str, ...]) -> Terms:
    hard = options.hard_weight
    if hard is None:
        hard = 1.0 if context.loss is not None else _HARD_SHARE if context.labels is not None else 0.0
    return Terms(
        temperature=_TEMPERATURE if options.temperature is None else options.temperature,
        hard_weight=hard,
        attention_weight=options.attention_weight,
        feature_weight=options.feature_weight,
        other=other,
        layers=layers,
        mixup=options.mixup,
        shift=options.shift,
        batch=max(32, options.batch),
    )


def _usual_rate(model: onnx.ModelProto) -> float:
    has = {node.op_type for node in model.graph.node}
    return _RATE_OF_CONVOLUTIONS if has & _CONVOLUTIONS or "Softmax" not in has else _RATE_OF_TRANSFORMERS


def _text(reference: str) -> str:
    """Return the source of the user's loss, so that a checkpoint of another loss is not resumed."""
    distillation.user_loss(reference)
    path, _, name = reference.rpartition(":")
    return Path(path).read_text(encoding="utf-8") + name


def _note_result(context: Context, what: str, pool: Pool, outcome: loop.Outcome) -> None:
    context.figures[f"{what}.loss_before"] = outcome.before
    context.figures[f"{what}.loss_after"] = outcome.after
    context.figures[f"{what}.steps"] = float(outcome.steps)
    context.figures[f"{what}.samples"] = float(pool.count)
    context.notes += outcome.notes
    if outcome.resumed:
        context.notes.append(f"{what}: went on from a checkpoint at step {outcome.resumed}")
    if pool.left_out:
        context.notes.append(f"{what}: {pool.left_out} samples were left out, memory holds {pool.count}")
    if pool.count < _FEW:
        context.notes.append(
            f"{what}: only {pool.count} calibration sample{'s' if pool.count > 1 else ''} to learn from; give more"
        )
    elif not pool.split:
        context.notes.append(f"{what}: the samples that it learnt from judged it too")
    if not outcome.after < outcome.before:
        context.notes.append(f"{what}: nothing better was found; the model is as it was before")
