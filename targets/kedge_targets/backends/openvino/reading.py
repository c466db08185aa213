"""Reads graphs with OpenVINO and compiles them for this host's CPU; what it refuses is named by its node."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import LoweringError, UnsupportedOperatorError
from kedge_targets.backends.openvino import library
from kedge_targets.graph import nodes, signature
from kedge_targets.toolchain.driver_side import blaming

if TYPE_CHECKING:
    import onnx

_UNREAD = re.compile(r"(?:No conversion rule found for operations|Conversion is failed for): *([^\n]+)")
_UNREAD_NODE = re.compile(r"While validating ONNX node '<Node\([^)]*\): ([^\n]*)>':\n([^\n]+)")
_UNTYPED = "input type dynamic"
_LONGEST = 120
_IN_FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def read(openvino: Any, graph: Path, given: onnx.ModelProto, *, folded: bool = True) -> Any:
    """Return OpenVINO's model of a graph.

    Args:
        graph: its file.
        given: the same graph.
        folded: whether what is computed of constants alone becomes one. The weights of a quantized file stay integers
            without.

    Raises:
        UnsupportedOperatorError: names the node that OpenVINO does not read.
        LoweringError: it refuses the whole, or changes the order of inputs or outputs.
    """
    try:
        model = openvino.Core().read_model(str(graph))
    except Exception as error:  # the library raises RuntimeError and its own, without a common base
        node, why = _unread(str(error), given)
        if node is not None:
            raise UnsupportedOperatorError(
                f"OpenVINO does not read operator {node.operator!r} of {node.domain}{why}",
                where=f"node {node.name!r}",
                remedy="Export the model with another operator in its place",
            ) from error
        raise LoweringError(f"OpenVINO cannot read the graph: {library.reason_of(error)}", where=graph.name) from error
    _check_order(model, given)
    if not folded:
        return model
    # NNCF takes a weight only where it is a constant, not where it is computed from one.
    from openvino.passes import ConstantFolding, Manager

    manager = Manager()
    manager.register_pass(ConstantFolding())
    manager.run_passes(model)
    # NNCF takes all that reads a tensor for parts of one model. But folding unrolls a short Loop and leaves ends of its
    # body on the tensors, and both branches of an If may read the same Constant.
    shared = any(node.op_type in ("If", "Loop") for inner in nodes.graphs(given.graph) for node in inner.node)
    return model.clone() if shared else model


def _unread(said: str, given: onnx.ModelProto) -> tuple[nodes.NodeInfo | None, str]:
    """Return the node that OpenVINO's message speaks of, and its reason; None if it speaks of none."""
    every = nodes.nodes(given)
    for name, reason in _UNREAD_NODE.findall(said):  # a node's own name, or its output's
        node = next((one for one in every if name in (one.name, *one.outputs)), None)
        if node is not None and _UNTYPED in reason:
            # What makes its input was read, but has no type, as sequences of tensors have none.
            return next((one for one in every if set(one.outputs) & set(node.inputs)), node), ""
        if node is not None:
            return node, f": {reason.rstrip('.')}"
    # Other messages name operators ("Det-17, com.example.Other-1"), not nodes.
    told = " ".join(_UNREAD.findall(said))
    named = (one for one in every if re.search(rf"(?<!\w){re.escape(one.operator)}(?!\w)", told))
    return next(named, None), ""


def compiled(openvino: Any, model: Any, given: onnx.ModelProto) -> Any:
    """Return a model compiled for this host's CPU, in float32.

    Args:
        given: the graph of the model, with shapes inferred.

    Raises:
        UnsupportedOperatorError: names the node that OpenVINO reads and cannot run.
    """
    try:
        return openvino.Core().compile_model(model, "CPU", _IN_FLOAT32)
    except Exception as error:  # without a common base, too; it names none of the graph's nodes
        node = blaming.culprit(
            given, lambda raw: openvino.Core().compile_model(openvino.Core().read_model(raw), "CPU", _IN_FLOAT32)
        )
        if node is None:
            raise
        why = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), "")
        raise UnsupportedOperatorError(
            f"OpenVINO cannot run operator {node.op_type!r}" + (f": {why}" if len(why) <= _LONGEST else ""),
            where=f"node {node.name!r}",
            remedy="Export the model with another operator in its place, or choose a target with another backend",
        ) from error


def _check_order(model: Any, given: onnx.ModelProto) -> None:
    """Check that the representation keeps inputs and outputs in their order, since a session takes arrays by
    position."""
    for kind, mine, theirs in (
        ("inputs", signature.inputs(given), model.inputs),
        ("outputs", signature.outputs(given), model.outputs),
    ):
        if len(mine) != len(theirs) or any(
            info.name not in port.get_names() for info, port in zip(mine, theirs, strict=True)
        ):
            raise LoweringError(
                f"OpenVINO changed the order of the {kind}",
                where=", ".join(info.name for info in mine),
                remedy="Report this model to Kedge's maintainers",
            )
