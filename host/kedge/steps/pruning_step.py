"""What the steps that prune have in common: options become one request to the pruner."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from kedge.step import Context, Step

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
