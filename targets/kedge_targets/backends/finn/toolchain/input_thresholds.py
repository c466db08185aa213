"""Places the thresholds of the network's input exactly, to the last bit: a part of the driver."""

import numpy


def rounding_of_inputs(model):
    """Return position of an input → qonnx's function from a float32 to its level, for inputs with one quantizer of one
    scale."""
    from qonnx.custom_op.general.quant import quant
    from qonnx.custom_op.registry import getCustomOp

    found = {}
    for place, given in enumerate(model.graph.input):
        readers = model.find_consumers(given.name) or []
        if len(readers) != 1 or readers[0].op_type not in ("Quant", "IntQuant"):
            continue
        constants = [model.get_initializer(name) for name in readers[0].input[1:]]
        if any(constant is None or constant.size != 1 for constant in constants):
            continue
        scale, zero, bits = (constant.reshape(()) for constant in constants)
        node = getCustomOp(readers[0])
        kind = [node.get_nodeattr(name) for name in ("signed", "narrow", "rounding_mode")]
        if int(bits) < 2 or kind[2].upper() not in ("ROUND", "HALF_EVEN"):
            continue

        def level(values, scale=scale, zero=zero, bits=bits, kind=kind):
            return numpy.rint(quant(values, scale, zero, bits, *kind) / scale + zero)

        found[place] = level
    return found


def make_exact(model, rounding):
    """Move thresholds of inputs to where qonnx's own arithmetic changes from one level to the next, in place. FINN
    computes them as (level + 0.5) x scale: a pixel exactly on such a half is rounded to even by ``Quant``, and upwards
    by a threshold."""
    places = {given.name: place for place, given in enumerate(model.graph.input)}
    for node in model.get_nodes_by_op_type("MultiThreshold"):
        source = node.input[0]
        while (maker := model.find_producer(source)) is not None and maker.op_type == "Transpose":
            source = maker.input[0]
        thresholds = model.get_initializer(node.input[1])
        level = rounding.get(places.get(source))
        if level is None or thresholds is None:
            continue
        near = [thresholds.astype(numpy.float32)]
        for away in (-numpy.inf, numpy.inf):
            value = near[0]
            for _ in range(4):
                value = numpy.nextafter(value, numpy.float32(away))
                near.append(value)
        near = numpy.sort(numpy.stack(near), axis=0)
        levels = level(near)
        # One step up within reach, from each threshold's level to the next: else it is none of this quantizer's.
        if not (levels[-1] == levels[0] + 1).all():
            continue
        first = numpy.argmax(levels > levels[0], axis=0)
        model.set_initializer(node.input[1], numpy.take_along_axis(near, first[None], axis=0)[0])
