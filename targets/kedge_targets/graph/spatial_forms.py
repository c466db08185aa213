"""Rewrites Pad, Resize and ConvTranspose from forms that runtimes read unlike to those that all of them read alike.

Beside an integer convolution, ONNX Runtime 1.31 permutes the values of a Pad or Resize as if they were of all axes;
OpenVINO 2026.4 takes no negative axes, ignores ``keep_aspect_ratio_policy``, and pads a ConvTranspose with
``output_shape`` at the other end.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_targets.graph import nodes
from kedge_targets.graph.names import Names
from kedge_targets.graph.wiring import Wiring

if TYPE_CHECKING:
    import onnx

Array = npt.NDArray[Any]


def spell_out(model: onnx.ModelProto) -> bool:
    """Give each Pad and Resize values for all axes, and each ConvTranspose explicit pads, in place, as far as constants
    and inferred shapes tell them. Return whether anything changed; shapes are then to be inferred anew."""
    spelled = _Spelled(model)
    # What is inserted comes before the node that reads it.
    made: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.domain in ("", nodes.DEFAULT_DOMAIN):
            made += spelled.rewritten(node)
        made.append(node)
    if spelled.changed:
        del model.graph.node[:]
        model.graph.node.extend(made)
    return spelled.changed


class _Spelled:
    """The rewriting of one model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._wiring = Wiring(model)
        self._names = Names(model)
        graph = model.graph
        self._dims = {
            value.name: [dim.dim_value or None for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        }
        self.changed = False

    def rewritten(self, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """Rewrite a node in place; return what must stand before it."""
        dims = self._dims.get(node.input[0]) if node.input else None
        if not dims:
            return []
        if node.op_type == "Pad":
            self._pad(node, len(dims))
        elif node.op_type == "ConvTranspose":
            self._transposed(node, dims)
        elif node.op_type == "Resize":
            return self._resize(node, dims)
        return []

    def _pad(self, node: onnx.NodeProto, rank: int) -> None:
        axes, pads = self._constant(node, 3), self._constant(node, 1)
        if axes is None or pads is None:
            return
        every = np.zeros((2, rank), np.int64)
        every[:, axes % rank] = pads.reshape(2, -1)
        node.input[1] = self._stored(node.input[1], every.reshape(-1))
        del node.input[3:]
        while not node.input[-1]:
            del node.input[-1]
        self.changed = True

    def _resize(self, node: onnx.NodeProto, dims: list[int | None]) -> list[onnx.NodeProto]:
        how = {attribute.name: attribute for attribute in node.attribute}
        policy = how["keep_aspect_ratio_policy"].s.decode() if "keep_aspect_ratio_policy" in how else "stretch"
        cropped = "coordinate_transformation_mode" in how and how["coordinate_transformation_mode"].s.startswith(b"tf_")
        if cropped or ("axes" not in how and policy == "stretch"):
            return []
        axes = [axis % len(dims) for axis in how["axes"].ints] if "axes" in how else list(range(len(dims)))
        scales, sizes = self._constant(node, 2), self._constant(node, 3)
        before: list[onnx.NodeProto] = []
        if policy != "stretch" and sizes is not None:
            scales = _common_scale(policy, [dims[axis] for axis in axes], sizes)
        elif scales is None and sizes is not None:
            scales = _exact_scales([dims[axis] for axis in axes], sizes)
        if scales is not None:
            every = np.ones(len(dims), np.float32)
            every[axes] = scales
            inputs = [node.input[0], "", self._stored(f"{node.name}_scales", every)]
        elif policy == "stretch" and sizes is not None and axes == list(range(len(dims)))[-len(axes) :]:
            inputs, before = self._sizes(node, len(dims) - len(axes), sizes)
        else:
            return []
        del node.input[:]
        node.input.extend(inputs)
        kept = [one for one in node.attribute if one.name not in ("axes", "keep_aspect_ratio_policy")]
        del node.attribute[:]
        node.attribute.extend(kept)
        self.changed = True
        return before

    def _sizes(self, node: onnx.NodeProto, leading: int, sizes: Array) -> tuple[list[str], list[onnx.NodeProto]]:
        """The inputs of a resize whose leading axes, which may be free, keep their sizes."""
        from onnx import helper

        shape, every = self._names.fresh(f"{node.name}_leading"), self._names.fresh(f"{node.name}_sizes")
        wanted = self._stored(f"{node.name}_trailing", sizes.astype(np.int64))
        before = [
            helper.make_node("Shape", [node.input[0]], [shape], name=self._names.fresh_node(shape), end=leading),
            helper.make_node("Concat", [shape, wanted], [every], name=self._names.fresh_node(every), axis=0),
        ]
        return [node.input[0], "", "", every], before

    def _transposed(self, node: onnx.NodeProto, dims: list[int | None]) -> None:
        how = {attribute.name: attribute for attribute in node.attribute}
        mode = how["auto_pad"].s.decode() if "auto_pad" in how else "NOTSET"
        weight = self._wiring.constant(node.input[1])
        if weight is None or ("output_shape" not in how and mode not in ("SAME_UPPER", "SAME_LOWER")):
            return
        rank = weight.ndim - 2
        strides, dilations, adjusted = (
            list(how[name].ints) if name in how else [usual] * rank
            for name, usual in (("strides", 1), ("dilations", 1), ("output_padding", 0))
        )
        before, behind = [], []
        for axis, size in enumerate(dims[2:]):
            if size is None:
                return
            whole = strides[axis] * (size - 1) + adjusted[axis] + (weight.shape[2 + axis] - 1) * dilations[axis] + 1
            wanted = how["output_shape"].ints[-rank:][axis] if "output_shape" in how else size * strides[axis]
            if wanted > whole:
                return
            small, large = (whole - wanted) // 2, (whole - wanted) - (whole - wanted) // 2
            # ONNX Runtime puts the odd one at the end for SAME_UPPER and at the beginning for all others.
            before.append(small if mode == "SAME_UPPER" else large)
            behind.append(large if mode == "SAME_UPPER" else small)
        self._set_pads(node, [*before, *behind])

    def _set_pads(self, node: onnx.NodeProto, pads: list[int]) -> None:
        from onnx import helper

        kept = [one for one in node.attribute if one.name not in ("auto_pad", "output_shape", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("pads", pads)])
        self.changed = True

    def _constant(self, node: onnx.NodeProto, index: int) -> Array | None:
        return self._wiring.constant(node.input[index]) if len(node.input) > index and node.input[index] else None

    def _stored(self, base: str, value: Array) -> str:
        from onnx import numpy_helper

        name = self._names.fresh(f"{base}_of_all_axes")
        self._model.graph.initializer.append(numpy_helper.from_array(value, name))
        return name


def _exact_scales(dims: list[int | None], sizes: Array) -> Array | None:
    """The scales that give these sizes and sample at the very same places; None if they are no exact float32."""
    found = []
    for dim, size in zip(dims, sizes.tolist(), strict=True):
        if dim is None or Fraction(float(np.float32(size / dim))) * dim != size:
            return None
        found.append(size / dim)
    return np.array(found, np.float32)


def _common_scale(policy: str, dims: list[int | None], sizes: Array) -> Array | None:
    """The one scale of an aspect ratio that is kept (ONNX, Resize-18); None where its sizes are rounded up, which a
    scale does not say."""
    known = [dim for dim in dims if dim is not None]
    if len(known) < len(dims):
        return None
    ratios = [np.float32(size / dim) for size, dim in zip(sizes.tolist(), known, strict=True)]
    scale = min(ratios) if policy == "not_larger" else max(ratios)
    if any(math.floor(float(scale) * dim) != math.floor(float(scale) * dim + 0.5) for dim in known):
        return None
    return np.full(len(dims), scale, np.float32)
