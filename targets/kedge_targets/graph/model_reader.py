"""Reads an ONNX file and reports whatever is wrong with it in one clear error."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import MissingDependencyError, ModelError
from kedge_targets.graph import (
    canonicalization,
    classifier_outputs,
    library,
    nodes,
    qonnx,
    spatial_forms,
    text_locales,
    topological_order,
)

if TYPE_CHECKING:
    import onnx

MAX_PROTOBUF_BYTES = 2**31 - 1
"""Protobuf's limit for one message."""


LOWEST_IR_VERSION = 4
"""IR version from which an initializer need not be an input too (ONNX, IR.md)."""
_BELOW_A_BYTE = ("INT4", "INT2", "FLOAT4E2M1")
"""Ends of the names of types that are packed into bytes."""


def read(path: Path) -> onnx.ModelProto:
    """Load a user's model, check it, and infer its shapes.

    Raises:
        ModelError: see :func:`load`, :func:`check` and :func:`infer_shapes`; or ONNX Runtime refuses it.
        UnsupportedOperatorError: an operator of no known opset, or one that ONNX Runtime has no kernel for.
    """
    model = load(path)
    check(model, where=str(path))
    model = infer_shapes(model, where=str(path))
    if spatial_forms.spell_out(model):
        model = infer_shapes(model, where=str(path))
    _check_loads(model, where=str(path))
    return model


def _check_loads(model: onnx.ModelProto, *, where: str) -> None:
    """Check a model with the reference runtime: ONNX's checker and shape inference accept contradictions that no
    runtime takes, and their strict mode refuses models that every runtime takes."""
    try:
        onnxruntime = library.load()
    except MissingDependencyError:
        return
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = qonnx.expand_qonnx(model) if qonnx.is_quantized(model) else model
    library.try_to_load(plain.SerializeToString(), settings, where=where)


def load(path: Path) -> onnx.ModelProto:
    """Load a model with its external data; each node gets a name (:func:`kedge_targets.graph.nodes.name_nodes`), and
    initializers that are inputs too become constants.

    Raises:
        ModelError: cannot be read, not ONNX, without outputs, its external data are missing, a constant is cut off, or
            its versions are newer than the installed ONNX Runtime takes.
    """
    import onnx
    from google.protobuf.message import DecodeError

    try:
        # The suffix is the user's affair: format is not guessed from it.
        model = onnx.load_model(str(path), format="protobuf", load_external_data=False)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except DecodeError as error:
        raise _not_onnx(path) from error
    if not model.graph.node or not model.opset_import:
        raise _not_onnx(path)
    if not model.graph.output:
        raise ModelError("has no outputs", where=str(path), remedy="Export it with the outputs that you need")
    _load_external(model, path)
    _check_constants(model, path)
    canonicalization.name_opsets_once(model)
    classifier_outputs.to_tensors(model)
    text_locales.name_one_that_is_everywhere(model)
    check_versions(model, where=str(path))
    model = _inlined(model, path)
    topological_order.sort_model(model)
    nodes.name_nodes(model)
    qonnx.normalize(model)
    _fix_constants(model)
    canonicalization.simplify_gemms(model)
    return model


def _inlined(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    try:
        return canonicalization.inline_functions(model)
    except Exception as error:  # the inliner raises whatever its C++ half throws
        raise ModelError(
            f"its own functions cannot be written out: {_one_line(error)}",
            where=str(path),
            remedy="Export the model without functions of its own",
        ) from error


def _fix_constants(model: onnx.ModelProto) -> None:
    """Make constants of initializers that are listed as inputs too (IR version 3), so that they can be folded and
    quantized."""
    constant = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in constant]
    if len(kept) < len(model.graph.input):
        del model.graph.input[:]
        model.graph.input.extend(kept)
        model.ir_version = max(model.ir_version, LOWEST_IR_VERSION)


def _not_onnx(path: Path) -> ModelError:
    return ModelError(
        "is not an ONNX model", where=str(path), remedy="Give the .onnx file that your framework exported"
    )


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    import onnx

    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, RuntimeError, onnx.checker.ValidationError) as error:
        raise ModelError(
            f"its external data cannot be read: {_one_line(error)}",
            where=str(path),
            remedy="Keep the data files beside the model, under the names that they were exported with",
        ) from error


def _check_constants(model: onnx.ModelProto, path: Path) -> None:
    """Check that each constant has as many bytes as its shape needs: a copy may have been cut off, also in the file of
    external data."""
    import onnx

    for graph in nodes.graphs(model.graph):
        for tensor in graph.initializer:
            if not tensor.HasField("raw_data") or tensor.data_type not in onnx.helper.get_all_tensor_dtypes():
                continue
            kind = onnx.TensorProto.DataType.Name(tensor.data_type)
            if kind.endswith(_BELOW_A_BYTE):
                continue
            needed = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
            if len(tensor.raw_data) != needed:
                shape = "x".join(map(str, tensor.dims))
                raise ModelError(
                    f"is damaged: constant {tensor.name!r} of shape {shape} ({kind.lower()}) has "
                    f"{len(tensor.raw_data)} bytes, {needed} were expected",
                    where=str(path),
                    remedy="Copy or export it again, with its data files",
                )


def check(model: onnx.ModelProto, *, where: str) -> None:
    """Check operators and structure.

    Raises:
        UnsupportedOperatorError: an operator of no known opset.
        ModelError: what ONNX's own checker says.
    """
    import onnx

    nodes.check_operators(model, where=where)
    if model.ByteSize() > MAX_PROTOBUF_BYTES:
        raise ModelError(
            f"has {model.ByteSize() / 2**30:.1f} GiB of weights, over protobuf's 2 GiB",
            where=where,
            remedy="Kedge compiles models for small devices; take a smaller one",
        )
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(
            f"is not a valid ONNX model: {_one_line(error)}", where=where, remedy="Export it again"
        ) from error


def infer_shapes(model: onnx.ModelProto, *, where: str) -> onnx.ModelProto:
    """Return a copy of the model with inferred shapes, as far as ONNX can infer them.

    Raises:
        ModelError: the shapes contradict each other.
    """
    import onnx

    if qonnx.is_quantized(model):
        return _shapes_taken_over(model, infer_shapes(qonnx.expand_qonnx(model), where=where))
    try:
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ModelError(f"its shapes contradict each other: {_one_line(error)}", where=where) from error


def _shapes_taken_over(model: onnx.ModelProto, inferred: onnx.ModelProto) -> onnx.ModelProto:
    """Return a QONNX model with shapes inferred from its expansion into plain operators."""
    import onnx

    made = onnx.ModelProto()
    made.CopyFrom(model)
    own = {tensor for node in model.graph.node for tensor in node.output}
    del made.graph.value_info[:]
    made.graph.value_info.extend(value for value in inferred.graph.value_info if value.name in own)
    return made


def check_versions(model: onnx.ModelProto, *, where: str) -> None:
    """Ask the installed ONNX Runtime whether it takes the model's IR version and opsets, by a model of one node with
    the same versions: its limits are in no table that it publishes. Nothing is checked where it is not installed.

    Raises:
        ModelError: names the version, the limit and what to do.
    """
    import onnx

    try:
        onnxruntime = library.load()
    except MissingDependencyError:
        return
    standard = [opset for opset in model.opset_import if opset.domain in ("", nodes.DEFAULT_DOMAIN, "ai.onnx.ml")]
    if not any(opset.domain != "ai.onnx.ml" for opset in standard):
        standard.append(onnx.helper.make_opsetid("", 17))
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["a"], ["b"])],
        "versions",
        [value("a", onnx.TensorProto.FLOAT, [1])],
        [value("b", onnx.TensorProto.FLOAT, [1])],
    )
    probe = onnx.helper.make_model(graph, ir_version=model.ir_version, opset_imports=standard)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common base but Exception
        raise _too_new(model, str(error), where, onnxruntime.__version__) from error


def _too_new(model: onnx.ModelProto, reason: str, where: str, installed: str) -> ModelError:
    runtime = f"the installed ONNX Runtime {installed}"
    if limit := re.search(r"max supported IR version: (\d+)", reason):
        return ModelError(
            f"has IR version {model.ir_version}, {runtime} takes up to {limit[1]}",
            where=where,
            remedy=f"Set model.ir_version = {limit[1]} before onnx.save, or update ONNX Runtime",
        )
    if limit := re.search(r"(\S+) is till opset (\d+)", reason):
        versions = {opset.domain or nodes.DEFAULT_DOMAIN: opset.version for opset in model.opset_import}
        version = versions.get(limit[1], "?")
        return ModelError(
            f"uses opset {version} of {limit[1]}, {runtime} takes up to {limit[2]}",
            where=where,
            remedy=f"Export it with opset {limit[2]} or lower, or update ONNX Runtime",
        )
    return ModelError(f"{runtime} does not take its versions: {_one_line(reason)}", where=where)


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
