"""Unstructured and N:M sparsity: sets single weights to zero. It makes nothing smaller or faster on a CPU; it helps
file compression, and GPUs that skip two of four weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from kedge.options import Option
from kedge.pruning.selection import Ranking
from kedge.step import Context, Step
from kedge_protocol.errors import ConfigError, StepError

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class SparsifyOptions:
    """Options of sparsification."""

    pattern: Annotated[str, Option("unstructured, or N:M such as 2:4: keep N of every M consecutive weights.")] = (
        "unstructured"
    )
    ratio: Annotated[float, Option("Share of the weights to zero, for unstructured sparsity.")] = 0.5
    ranking: Annotated[Ranking, Option("Whether each layer loses this share, or all layers together.")] = Ranking.LAYER
    leave: Annotated[tuple[str, ...], Option("Nodes that keep all weights.")] = ()


class Sparsify(Step[SparsifyOptions]):
    """Sets the weights of least magnitude to zero."""

    name: ClassVar[str] = "sparsify"
    Options = SparsifyOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`.

        Raises:
            StepError: no layer has weights that could become zero.
            ConfigError: a pattern that is not known, a share outside 0 to 1.
        """
        import numpy as np
        from onnx import numpy_helper

        from kedge.pruning import constant_folding, sparsity

        chosen = sparsity.pattern(self.options.pattern)
        if not 0 <= self.options.ratio < 1:
            raise ConfigError(f"ratio {self.options.ratio} is not from 0 to below 1", where=f"step {self.name!r}")
        made = constant_folding.fold_constants(model)
        axes = sparsity.weights(made, self.options.leave)
        tensors = {tensor.name: tensor for tensor in made.graph.initializer if tensor.name in axes}
        arrays = {name: numpy_helper.to_array(tensor) for name, tensor in tensors.items()}
        if chosen is None:
            masks = sparsity.smallest(arrays, self.options.ratio, together=self.options.ranking is Ranking.GLOBAL)
        else:
            found = {name: sparsity.best_of(array, axes[name], chosen) for name, array in arrays.items()}
            masks = {name: mask for name, mask in found.items() if mask is not None}
        if not masks:
            raise StepError(
                "finds no layer with weights that could become zero",
                where=f"step {self.name!r}",
                remedy="Leave this step out of the recipe",
            )
        for name, mask in masks.items():
            sparse = np.where(mask, arrays[name], np.zeros((), arrays[name].dtype))
            tensors[name].CopyFrom(numpy_helper.from_array(sparse, name))
        total = sum(array.size for array in arrays.values())
        zeros = sum(int((~mask).sum()) for mask in masks.values())
        before, after = sparsity.compressed(model), sparsity.compressed(made)
        context.figures |= {"sparsity": zeros / total, "compressed_ratio": after / before}
        context.notes.append(
            f"{self.name}: {zeros:,} of {total:,} weights are zero ({self.options.pattern}). This makes nothing faster "
            "on processors, whose runtimes multiply zeros like other numbers, and the files stay as large; packed by "
            f"zlib they take {after / before:.2f} of before. {_FOR_WHOM[chosen == sparsity.Pattern(2, 4)]}"
        )
        return made


_FOR_WHOM = {
    False: "It profits who sends or stores files packed",
    True: "It profits GPUs with sparse tensor cores (NVIDIA Ampere and later, TensorRT with sparsity switched on)",
}
