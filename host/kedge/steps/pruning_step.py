"""What the steps that prune have in common: options become one request to the pruner."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from kedge.pruning.importance import BY_DECODERS, Importance
from kedge.step import Context, Step
from kedge_protocol.errors import ConfigError

if TYPE_CHECKING:
    import onnx

    from kedge.pruning.selection import Limits


class PruningOptions(Protocol):
    """Options of a pruning step: fields of :class:`kedge.pruning.pruner.PruningRequest`, and its limits."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def limits(self) -> Limits:
        """The bounds of one layer."""


Options = TypeVar("Options", bound=PruningOptions)


class PruningStep(Step[Options]):
    """A step that prunes one kind of channel.

    Attributes:
        kinds: values of :class:`kedge.pruning.groups.Kind`.
        what: the kind, as notes and errors name it.
    """

    kinds: ClassVar[tuple[str, ...]]
    what: ClassVar[str]

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`.

        Raises:
            StepError, ConfigError, ModelError: see :func:`kedge.pruning.pruner.prune`.
        """
        from kedge.pruning import pruner
        from kedge.pruning.groups import Kind

        taken = {field.name for field in dataclasses.fields(pruner.PruningRequest)}
        given = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        request = pruner.PruningRequest(
            step=self.name,
            kinds=tuple(Kind(kind) for kind in self.kinds),
            what=self.what,
            limits=self.options.limits,
            **{name: value for name, value in given.items() if name in taken},
        )
        return pruner.prune(model, context, request)


def check_for_decoder(ratio: float, by: Importance, named: Collection[Collection[str]], *, where: str) -> None:
    """Check what a language model takes: no names of nodes, since it has no graph yet and its layers keep one width.

    Raises:
        ConfigError: a ratio out of range, an importance that is not known, or a name is given.
    """
    if not 0 <= ratio < 1:
        raise ConfigError(f"ratio is {ratio}", where=where, remedy="Give at least 0 and below 1")
    if by not in BY_DECODERS:
        known = ", ".join(one.value for one in BY_DECODERS)
        raise ConfigError(
            f"importance {by.value!r} is not for language models", where=where, remedy=f"Known are {known}"
        )
    if any(named):
        raise ConfigError(
            "layers and leave name nodes, a language model has none", where=where, remedy="Leave them out"
        )
