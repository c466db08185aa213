"""Distillation: trains a student towards its teacher's outputs, on samples that need no labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from kedge.evaluation import user
from kedge.evaluation.kinds import class_numbers
from kedge.evaluation.metrics.classes import check_labels
from kedge.training import blocks, losses
from kedge.training.blocks import Pairs
from kedge.training.losses import Head, Kind
from kedge.training.network import Network
from kedge.training.samples import Pool, mixed, moved
from kedge_protocol.errors import ConfigError, DatasetError, StepError
from kedge_targets.graph import padding

Array = npt.NDArray[Any]
Tensor: TypeAlias = torch.Tensor
UserLoss = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], Tensor | None], Tensor]

WHERE = "--loss"
_FEATURES_BESIDE_SCORES = 30.0
_FEW = 50
"""Measured on a damaged ResNet-8 with 50 images (top-1 0.08): soft labels alone brought it to 0.36, this to 0.77,
since feature maps say far more about a sample than a few scores. With many samples they force a low-bit student
towards what it cannot represent: with 6000 digits and 2 bits the drop was 0.039 with this weight, and 0.010 with a
hundredth of it."""
_FEATURES_BESIDE_VALUES = 1.0
_LEVEL = 0.3
"""Weight of the square error of the scores themselves where the teacher is another model (after Ba, Caruana, "Do deep
nets really need to be deep?", 2014): soft labels leave their level free, and whoever holds them against a threshold
needs the teacher's."""
_USUAL_SPREAD = 4.0
"""Standard deviation to which a sample's larger logits are scaled down: some networks give logits in the hundreds, of
which a temperature of 4 would leave one class and no gradient for the rest (after Sun et al., "Logit standardization in
knowledge distillation", 2024)."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The terms of the loss.

    Attributes:
        temperature: of soft labels.
        hard_weight: share of the hard-label term, or of the user's own loss; the rest is soft labels.
        attention_weight, feature_weight: of these additional terms; None for the default for the kind of output and the
            number of samples.
        features: number of tensors that are compared.
        other: whether the teacher is another model: nothing but its inputs and outputs has the student's names.
        layers: of a teacher that is another model, see :func:`kedge.training.blocks.layer_map`.
        mixup: whether samples are blended.
        shift: whether images are shifted.
        batch: samples per batch in evaluation.
    """

    temperature: float
    hard_weight: float
    attention_weight: float
    feature_weight: float | None
    features: int = 8
    other: bool = False
    layers: tuple[str, ...] = ()
    mixup: bool = False
    shift: bool = False
    batch: int = 32


class Distillation:
    """The objective of distillation; see :class:`kedge.training.loop.Objective`.

    Args:
        student, teacher: tensors of the same name mean the same in both; of a teacher that is another model only
            inputs and outputs (:mod:`kedge.training.teacher_graph`).
        one_by_one: the graphs take only one sample at a time.
        loss: the user's own, ``file.py:function``.

    Raises:
        StepError: no output can be compared.
        DatasetError: the labels are not classes of the first output.
        ConfigError: the user's loss cannot be loaded, or a map of layers does not fit.
    """

    def __init__(
        self,
        student: Network,
        teacher: Network,
        pool: Pool,
        terms: Terms,
        *,
        one_by_one: bool = False,
        loss: str | None = None,
    ) -> None:
        self.student, self.teacher, self.pool, self.terms = student, teacher, pool, terms
        self.training = pool.training
        self._one_by_one = one_by_one
        self._user = None if loss is None else user_loss(loss)
        few = pool.feeds(pool.judging[:8])
        with torch.no_grad():
            answers = self._computed(teacher, few, ())
        outputs = {name: tensor.numpy() for name, tensor in answers.items()}
        self.heads = losses.heads(student.model, outputs)
        if not self.heads:
            raise StepError("no output holds real numbers, there is nothing to distil", remedy="Leave this step out")
        self._their_heads = {head.output: head for head in losses.heads(teacher.model, outputs)}
        scores = any(head.kind is not Kind.VALUES for head in self.heads)
        beside_scores = _FEATURES_BESIDE_SCORES * min(1.0, _FEW / pool.count)
        usual = beside_scores if scores else _FEATURES_BESIDE_VALUES
        self._spread = {head.output: self._too_wide(head, few) for head in self._their_heads.values()}
        self._feature_weight = usual if terms.feature_weight is None else terms.feature_weight
        self._maps, self._features = self._compared(few)
        self._keep = tuple(dict.fromkeys([*(head.tensor for head in self.heads), *self._maps, *self._features]))
        theirs = (head.tensor for head in self._their_heads.values())
        self._theirs = tuple(dict.fromkeys([*theirs, *self._maps.values(), *self._features.values()]))
        self._projections: dict[str, torch.nn.Parameter] = {}
        if self._features:
            self._project(few)
        self._hard = self.pool.labels is not None and terms.hard_weight > 0 and self._user is None
        if self._hard:
            self._check_labels(outputs)

    @property
    def projections(self) -> list[torch.nn.Parameter]:
        """Return the projections from the student's widths to the teacher's, which are trained too and then
        discarded."""
        return list(self._projections.values())

    def loss(self, picked: Array, random: np.random.Generator) -> Tensor:
        """Return the training loss; see :class:`kedge.training.loop.Objective`."""
        feeds = self.pool.feeds(picked)
        labels = self.pool.labels_of(picked)
        if self.terms.shift:
            feeds = moved(feeds, random)
        if self.terms.mixup and not self._hard and self._user is None:
            feeds = mixed(feeds, random)
        return self._loss(feeds, labels)

    def judged(self) -> float:
        """Return the held-out loss; see :class:`kedge.training.loop.Objective`."""
        total = 0.0
        with torch.no_grad():
            for start in range(0, len(self.pool.judging), self.terms.batch):
                picked = self.pool.judging[start : start + self.terms.batch]
                loss = self._loss(self.pool.feeds(picked), self.pool.labels_of(picked))
                total += float(loss) * len(picked)
        return total / len(self.pool.judging)

    def _loss(self, feeds: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        ours = self._computed(self.student, feeds, self._keep)
        hard = self.terms.hard_weight if self._hard or self._user is not None else 0.0
        total = torch.zeros(())
        if self._user is not None:
            outputs = {name: ours[name] for name in self.student.outputs}
            total = total + hard * _called(self._user, outputs, feeds, labels)
        elif self._hard and labels is not None:
            head = self.heads[0]
            total = total + hard * losses.hard_labels(losses.logits(head, ours[head.tensor]), labels)
        if hard < 1 or self._maps or self._features:
            with torch.no_grad():
                theirs = self._computed(self.teacher, feeds, self._theirs)
            if hard < 1:
                total = total + (1 - hard) * self._soft(ours, theirs, feeds)
            for name, other in self._maps.items():
                share = self.terms.attention_weight / len(self._maps)
                total = total + share * losses.attention(ours[name], theirs[other])
            for name, other in self._features.items():
                share = self._feature_weight / len(self._features)
                total = total + share * losses.features(self._projected(name, ours[name]), theirs[other])
        return total

    def _soft(self, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], feeds: Mapping[str, Tensor]) -> Tensor:
        total = torch.zeros(())
        for head in self.heads:
            other = self._their_heads[head.output]
            student, teacher = ours[head.tensor], theirs[other.tensor]
            if head.kind is Kind.VALUES:
                total = total + losses.values(student, teacher, _real_places(student, feeds))
            else:
                wide = self._spread[head.output]
                left, right = losses.logits(head, student) / wide, losses.logits(other, teacher) / wide
                total = total + losses.soft_labels(left, right, self.terms.temperature)
                if self.terms.other:
                    total = total + _LEVEL * losses.features(left, right)
        return total / len(self.heads)

    def _too_wide(self, head: Head, feeds: Mapping[str, Tensor]) -> float:
        """Return the spread of the teacher's logits as a multiple of the usual spread, at least 1."""
        if head.kind is Kind.VALUES:
            return 1.0
        with torch.no_grad():
            answers = losses.logits(head, self._computed(self.teacher, feeds, (head.tensor,))[head.tensor])
        return max(1.0, float(answers.std(dim=-1).mean()) / _USUAL_SPREAD)

    def _computed(self, network: Network, feeds: Mapping[str, Tensor], keep: tuple[str, ...]) -> dict[str, Tensor]:
        return network.each(feeds, keep) if self._one_by_one else network(feeds, keep)

    def _compared(self, feeds: Mapping[str, Tensor]) -> tuple[Pairs, Pairs]:
        """Return the attention maps and the features that are compared."""
        attention, features = bool(self.terms.attention_weight), bool(self._feature_weight)
        if not self.terms.other:
            model = self.student.model
            maps = self._common(losses.attention_maps(model, self.heads) if attention else [])
            return maps, self._common(losses.feature_tensors(model, self.terms.features) if features else [])

        def found(network: Network, heads: list[Head]) -> blocks.Blocks:
            with torch.no_grad():
                return blocks.blocks(network.model, heads, lambda names: self._computed(network, feeds, tuple(names)))

        ours, theirs = found(self.student, self.heads), found(self.teacher, list(self._their_heads.values()))
        maps, ends = blocks.paired(blocks.layer_map(self.terms.layers, ours, theirs), ours, theirs)
        return maps if attention else {}, ends if features else {}

    def _common(self, names: list[str]) -> Pairs:
        """Return the tensors that the teacher has too: passes may have renamed some."""
        theirs = {name for node in self.teacher.model.graph.node for name in node.output}
        return {name: name for name in names if name in theirs}

    def _project(self, feeds: Mapping[str, Tensor]) -> None:
        """Make a matrix for each feature whose width differs from the teacher's, initialized by least squares."""
        with torch.no_grad():
            ours = self._computed(self.student, feeds, self._keep)
            theirs = self._computed(self.teacher, feeds, self._theirs)
        for name, other in list(self._features.items()):
            axis = _channels(ours[name])
            left, right = ours[name].movedim(axis, -1), theirs[other].movedim(axis, -1)
            if left.shape == right.shape:
                continue
            if left.shape[:-1] != right.shape[:-1]:
                del self._features[name]
                continue
            flat, wanted = left.flatten(0, -2), right.flatten(0, -2)
            solved = torch.linalg.lstsq(flat, wanted, driver="gelsd").solution
            self._projections[name] = torch.nn.Parameter(solved)

    def _projected(self, name: str, tensor: Tensor) -> Tensor:
        if name not in self._projections:
            return tensor
        axis = _channels(tensor)
        return (tensor.movedim(axis, -1) @ self._projections[name]).movedim(-1, axis)

    def _check_labels(self, outputs: Mapping[str, Array]) -> None:
        head, labels = self.heads[0], self.pool.labels
        if head.kind is Kind.VALUES or labels is None:
            raise DatasetError(
                f"there are labels, but output {head.output!r} holds no class scores",
                where="calibration",
                remedy="Give your own --loss file.py:function, or set hard_weight to 0",
            )
        scores: Array = np.zeros((len(labels), outputs[head.output].shape[-1]), dtype=np.float32)
        check_labels(labels, scores, where="calibration")
        self.pool.labels = class_numbers(labels, scores)


def user_loss(reference: str) -> UserLoss:
    """Load the user's ``function(outputs, inputs, labels) -> scalar``; all of these are tensors.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be imported.
    """
    try:
        found: Any = user.load(reference)
    except ConfigError as error:
        raise ConfigError(error.what, where=WHERE, remedy=error.remedy) from error
    loss: UserLoss = found
    return loss


def _called(
    function: UserLoss, outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor], labels: Tensor | None
) -> Tensor:
    try:
        value = function(outputs, inputs, labels)
    except Exception as error:
        raise ConfigError(f"your loss raised {type(error).__name__}: {error}", where=WHERE) from error
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise ConfigError(f"your loss gave {type(value).__name__}, a tensor of one number was expected", where=WHERE)
    return value.reshape(())


def _channels(tensor: Tensor) -> int:
    """Return the axis of the channels: images inside a graph are channels first, everything else is channels last."""
    return 1 if tensor.ndim >= 4 else -1


def _real_places(output: Tensor, feeds: Mapping[str, Tensor]) -> Tensor | None:
    """Return a weight for each vector of an output N x length x width: 0 where an input's attention mask marks padding,
    since nothing reads the output there."""
    if output.ndim != 3:
        return None
    for name, tensor in feeds.items():
        if padding.is_mask(name) and not tensor.is_floating_point() and tensor.shape == output.shape[:2]:
            return (tensor != 0).to(output.dtype)
    return None
