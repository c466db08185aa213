"""Bias correction: subtracts the mean shift of a layer's output, which rounding causes, from the layer's bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt

from kedge.options import Option
from kedge.quantization import equalization
from kedge.step import Context, Step
from kedge.steps.limited_samples import LimitedSamples
from kedge_protocol.errors import ConfigError, KedgeError, StepError
from kedge_targets.graph import dead_code, fakequant, gptq, library, padding, qonnx, quantizers
from kedge_targets.graph.layers import Layer, layers
from kedge_targets.numerics import Precision

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]

_TWIN = "kedge_twin_"


@dataclass(frozen=True, kw_only=True)
class CorrectBiasOptions:
    """Options of bias correction."""

    samples: Annotated[int, Option("Largest number of calibration samples.")] = 128


class CorrectBias(Step[CorrectBiasOptions]):
    """Corrects the mean error that rounding causes in each layer's output (Nagel et al., "Data-Free Quantization
    Through Weight Equalization and Bias Correction", ICCV 2019). All layers are measured in one run, each on the float
    graph's activations, so that no layer is corrected for another's error."""

    name: ClassVar[str] = "correct-bias"
    Options = CorrectBiasOptions

    def apply(self, model: onnx.ModelProto, context: Context) -> onnx.ModelProto:
        """See :class:`kedge.step.Step`. BatchNormalization behind convolutions is folded first; a layer
        without a bias gets one.

        Raises:
            ConfigError: no samples are asked for.
            StepError: the graph does not run on a sample, or there is none.
            LoweringError, ModelError: see :mod:`kedge_targets.graph.fakequant`.
        """
        import onnx

        if self.options.samples < 1:
            raise ConfigError("samples is below 1", where="correct-bias", remedy="Give 1 or more")
        made = onnx.ModelProto()
        made.CopyFrom(model)
        equalization.fold_batch_normalization(made)
        if not context.plan.quantizes:
            context.notes.append("correct-bias: the plan rounds nothing")
            return made
        small = _small(made, context, self.options.samples)
        probe, watched = _twins(made, small, context, self.options.samples)
        errors = _errors(probe, watched, context, self.options.samples)
        by_name = {node.name: node for node in made.graph.node}
        corrected = 0
        for layer, error in errors.items():
            corrected += _subtract(made, by_name[layer], error)
        # The error was that of these very codes: the backend is to store no others.
        few = {one.weight for one in watched.values() if gptq.applies(_precision(one, context))}
        _store(made, {name: value for name, value in small.items() if name in few})
        largest = max((float(np.abs(error).max()) for error in errors.values()), default=0.0)
        context.notes.append(f"correct-bias: {corrected} layers corrected, by {largest:.3g} at most")
        context.figures |= {"correct-bias.layers": corrected, "correct-bias.largest": largest}
        return made


def _twins(
    model: onnx.ModelProto, small: Mapping[str, Array], context: Context, limit: int
) -> tuple[onnx.ModelProto, dict[str, Layer]]:
    """The float graph with a rounded twin beside each layer that the plan rounds; the layers by name."""
    import onnx

    simulated = _simulated(model, small, context, limit)
    nodes = {node.name: node for node in simulated.graph.node}
    originals = {node.name: node for node in model.graph.node}
    twins = _Twins(model, simulated)
    watched = {}
    for layer in layers(model):
        node, original = nodes.get(layer.name), originals[layer.name]
        if node is None or layer.weight is None or layer.operator == "Gather":
            continue
        same = list(node.input) == list(original.input)
        if same and not any(twins.differs(tensor) for tensor in node.input):
            continue
        twins.clone(node)
        watched[layer.name] = layer
    made = twins.graph
    del made.graph.output[:]
    for name in watched:
        for tensor in (originals[name].output[0], _TWIN + nodes[name].output[0]):
            made.graph.output.append(onnx.helper.make_empty_tensor_value_info(tensor))
    dead_code.remove_dead_nodes(made)
    return qonnx.expand_qonnx(made), watched


class _Twins:
    """A copy of the float graph that takes in nodes of the simulated one under names of their own.

    Attributes:
        graph: the copy.
    """

    def __init__(self, model: onnx.ModelProto, simulated: onnx.ModelProto) -> None:
        import onnx

        self.graph = onnx.ModelProto()
        self.graph.CopyFrom(model)
        for opset in simulated.opset_import:
            if all(opset.domain != have.domain for have in self.graph.opset_import):
                self.graph.opset_import.append(opset)
        self._makers = {tensor: node for node in simulated.graph.node for tensor in node.output}
        self._stored = {tensor.name: tensor for tensor in simulated.graph.initializer}
        self._floats = {tensor.name: tensor for tensor in model.graph.initializer}
        self._known = set(self._floats) | {tensor for node in model.graph.node for tensor in node.output}
        self._known |= {value.name for value in model.graph.input}
        self._weighted = {layer.name for layer in layers(model) if layer.weight is not None}
        self._added: set[str] = set()
        self._rounded: dict[str, bool] = {}

    def differs(self, tensor: str) -> bool:
        """Whether a tensor's numbers are others in the simulation, since the last layers before it."""
        return self._is_changed(tensor) or self._is_rounded(tensor)

    def clone(self, node: onnx.NodeProto) -> None:
        """Take in a node of the simulation and what it reads."""
        import onnx

        new = onnx.NodeProto()
        new.CopyFrom(node)
        del new.input[:]
        new.input.extend(self._copied(tensor) for tensor in node.input)
        for index, tensor in enumerate(node.output):
            new.output[index] = _TWIN + tensor
            self._added.add(_TWIN + tensor)
        new.name = _TWIN + node.name
        self.graph.graph.node.append(new)

    def _is_changed(self, tensor: str) -> bool:
        """Whether an initializer has other numbers in the simulation."""
        if tensor not in self._floats or tensor not in self._stored:
            return False
        return bool(self._floats[tensor].SerializeToString() != self._stored[tensor].SerializeToString())

    def _is_rounded(self, tensor: str) -> bool:
        """Whether a tensor is rounded somewhere behind the last layers: pooling and sums round too."""
        if tensor not in self._rounded:
            node = self._makers.get(tensor)
            self._rounded[tensor] = (
                node is not None
                and node.name not in self._weighted
                and (node.op_type == fakequant.QUANT or any(self._is_rounded(name) for name in node.input))
            )
        return self._rounded[tensor]

    def _copied(self, tensor: str) -> str:
        """The name that a tensor of the simulation has in the copy; it is taken in where it is missing."""
        from onnx import numpy_helper

        if not tensor or (tensor in self._known and not self.differs(tensor)):
            return tensor
        name = _TWIN + tensor
        if name in self._added:
            return name
        self._added.add(name)
        if tensor in self._stored:
            array = numpy_helper.to_array(self._stored[tensor])
            self.graph.graph.initializer.append(numpy_helper.from_array(array, name))
            return name
        self.clone(self._makers[tensor])
        return name


def _simulated(model: onnx.ModelProto, small: Mapping[str, Array], context: Context, limit: int) -> onnx.ModelProto:
    """Return the graph with the plan's rounding simulated."""
    plan = context.plan
    try:
        found = fakequant.calibrate(model, plan, LimitedSamples(context, limit), progress=context.progress)
    except KedgeError:
        raise
    except Exception as error:  # the library's errors have no common base but Exception
        raise _not_run(error) from error
    made = fakequant.insert_quantizers(model, plan, found)
    _store(made, small)
    return made


def _precision(layer: Layer, context: Context) -> Precision:
    return quantizers.precision_of(layer.name, context.plan)


def _small(model: onnx.ModelProto, context: Context, limit: int) -> dict[str, Array]:
    """Weights that are stored small and that one layer alone reads, as they come back."""
    weights = equalization.Weights(model)
    own = [one for one in layers(model, weights.wiring) if one.weight and weights.own(one.weight) is not None]
    return gptq.round_weights(
        model,
        LimitedSamples(context, limit),
        {layer.name: _precision(layer, context) for layer in own},
        group_size=context.plan.group_size,
        asymmetric=context.plan.asymmetric_weights,
        seed=context.seed,
    )


def _store(model: onnx.ModelProto, values: Mapping[str, Array]) -> None:
    weights = equalization.Weights(model)
    for name, value in values.items():
        weights.replace(name, value)


def _errors(probe: onnx.ModelProto, watched: Mapping[str, Layer], context: Context, limit: int) -> dict[str, Array]:
    """Return the mean error of each channel of each layer's output; padding, which would be most of it, does not
    count."""
    if not watched:
        return {}
    session = library.load().InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in probe.graph.output]
    sums: dict[str, Array] = {}
    counts: dict[str, int] = {}
    for feed in LimitedSamples(context, limit):
        try:
            answers = session.run(names, feed)
        except Exception as error:  # the library's errors have no common base but Exception
            raise _not_run(error) from error
        for (name, layer), exact, rounded in zip(watched.items(), answers[0::2], answers[1::2], strict=True):
            axis = 1 if layer.operator in ("Conv", "ConvTranspose") else -1
            difference = np.moveaxis(rounded.astype(np.float64) - exact, axis, -1)
            flat = difference.reshape(-1, difference.shape[-1])
            if (real := padding.real_rows(feed, difference.shape)) is not None:
                flat = flat[real]
            sums[name] = sums.get(name, 0) + flat.sum(axis=0)
            counts[name] = counts.get(name, 0) + len(flat)
    if not sums:
        raise StepError("there are no calibration samples", where="correct-bias", remedy="Give at least one")
    return {name: total / counts[name] for name, total in sums.items()}


def _not_run(error: Exception) -> StepError:
    return StepError(
        f"the graph does not run on the calibration samples: {library.reason_of(error)}",
        where="correct-bias",
        remedy="Give samples of the shape that the model takes",
    )


def _subtract(model: onnx.ModelProto, node: onnx.NodeProto, error: Array) -> bool:
    """Take an error off a layer's bias; False where its bias is no constant of its own."""
    from onnx import helper

    weights = equalization.Weights(model)
    if node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        beta = next((attribute.f for attribute in node.attribute if attribute.name == "beta"), 1.0)
        if len(node.input) > 2 and node.input[2]:
            bias = weights.own(node.input[2])
            if bias is None or bias.shape[-1] != error.size or beta != 1.0:
                return False
            weights.replace(node.input[2], bias - error)
        else:
            name = weights.add(f"{node.name}_bias", (-error).astype(np.float32))
            del node.input[2:]
            node.input.append(name)
        return True
    answer = node.output[0]
    readers = weights.wiring.readers[answer]
    if len(readers) == 1 and readers[0][0].op_type == "Add" and answer not in weights.wiring.outputs:
        name = readers[0][0].input[1 - readers[0][1]]
        bias = weights.own(name)
        if bias is not None and bias.size == error.size == bias.shape[-1]:
            weights.replace(name, bias - error.reshape(bias.shape))
            return True
    name = weights.add(f"{node.name}_bias", (-error).astype(np.float32))
    node.output[0] = f"{answer}_uncorrected"
    added = helper.make_node("Add", [node.output[0], name], [answer], name=f"{node.name}_corrected")
    model.graph.node.insert(list(model.graph.node).index(node) + 1, added)
    return True
