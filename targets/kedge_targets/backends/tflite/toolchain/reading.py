"""Converts TensorFlow's models to ONNX graphs, in the toolchain's own environment: the driver's task ``read``.

The graph is compared with the model on the same noise.
"""

import importlib.metadata
from pathlib import Path

OPSET = 18
"""The newest opset that tf2onnx 1.17 writes."""

AGREES = 1e-3
"""The largest allowed difference, relative to the output's largest value."""

_FREE = 5  # length of a free axis in a trial
_SIGNATURE = "serving_default"
_QUANTIZED = ("INT8", "UINT8", "INT16", "INT4")


class RefusedError(Exception):
    """An error with its class in Kedge's hierarchy."""

    def __init__(self, kind, what, remedy=None, node=None):
        super().__init__(what)
        self.kind, self.what, self.remedy, self.node = kind, what, remedy, node


def read(path, graph):
    """Write ``graph``; return notes for the user, and the versions of the packages that read the model."""
    path = Path(path)
    notes, model, answers = _saved_model(path) if path.is_dir() else _tflite(path)
    _check_operators(model)
    model.ir_version = min(model.ir_version, 10)
    Path(graph).write_bytes(model.SerializeToString())
    _compare(model, answers)
    packages = ("tf2onnx", "tensorflow-cpu" if path.is_dir() else "ai-edge-litert")
    return {"notes": notes, "packages": {name: importlib.metadata.version(name) for name in packages}}


def _saved_model(path):
    """Return the graph of a SavedModel's signature, and a function that runs it."""
    import tensorflow as tf
    import tf2onnx

    try:
        loaded = tf.saved_model.load(str(path))
    except Exception as error:
        raise RefusedError(
            "ModelError", f"TensorFlow cannot load it: {_one_line(error)}", "Save it again with TensorFlow 2"
        ) from error
    signatures = dict(loaded.signatures)
    name = _SIGNATURE if _SIGNATURE in signatures else next(iter(signatures), None)
    if name is None or (name != _SIGNATURE and len(signatures) > 1):
        listed = ", ".join(sorted(signatures)) or "none"
        raise RefusedError(
            "ModelError",
            f"it has no signature {_SIGNATURE!r} (its signatures: {listed})",
            f"Save it with signatures={{{_SIGNATURE!r}: function}}",
        )
    function = signatures[name]
    inputs = function.structured_input_signature[1]
    outputs = list(function.structured_outputs)
    for tensor in inputs.values():
        if tensor.shape.rank is None:
            raise RefusedError("ModelError", f"the rank of input {tensor.name!r} is not known", "Save it with one")
    specs = [tf.TensorSpec(spec.shape, spec.dtype, name=key) for key, spec in inputs.items()]

    def flat(*arrays):
        made = function(**dict(zip(inputs, arrays, strict=True)))
        # An output that is an input would lose its own name.
        return {key: tf.identity(made[key], name=key) for key in outputs}

    # tf2onnx takes the order of the outputs from the function, the names from here.
    try:
        model, _ = tf2onnx.convert.from_function(
            tf.function(flat, input_signature=specs), input_signature=specs, opset=OPSET
        )
    except Exception as error:
        raise _unconverted(error) from error
    # A dict's answers are flattened by their sorted keys.
    _rename(model, list(inputs), sorted(outputs))

    def answers(feed):
        made = function(**{key: tf.constant(array) for key, array in feed.items()})
        return {key: made[key].numpy() for key in outputs}

    notes = [] if name == _SIGNATURE else [f"signature {name!r}, the only one"]
    return notes, model, answers


def _tflite(path):
    """Return the graph of a ``.tflite``, and a function that runs it."""
    import tf2onnx
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    content = path.read_bytes()
    if content[4:8] != b"TFL3":
        raise RefusedError("ModelError", "is no .tflite file", "Give the file that TensorFlow's converter wrote")
    try:
        described = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    except Exception as error:
        raise RefusedError("ModelError", f"is broken: {_one_line(error)}", "Convert it again") from error
    _check_float(described, schema)
    try:
        interpreter = Interpreter(
            model_content=content, experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        )
        interpreter.allocate_tensors()
    except Exception as error:
        raise RefusedError("ModelError", f"LiteRT refuses it: {_one_line(error)}", "Convert it again") from error
    try:
        model, _ = tf2onnx.convert.from_tflite(str(path), opset=OPSET)
    except Exception as error:
        raise _unconverted(error) from error
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    named = _signature_names(described)
    places = {item["index"]: named.get(item["index"], _plain(item["name"])) for item in (*inputs, *outputs)}
    _rename(
        model,
        [places[item["index"]] for item in inputs],
        [places[item["index"]] for item in outputs],
    )

    def answers(feed):
        for item in inputs:
            interpreter.resize_tensor_input(item["index"], feed[places[item["index"]]].shape)
        interpreter.allocate_tensors()
        for item in inputs:
            interpreter.set_tensor(item["index"], feed[places[item["index"]]])
        interpreter.invoke()
        return {places[item["index"]]: interpreter.get_tensor(item["index"]).copy() for item in outputs}

    return [], model, answers


def _check_float(described, schema):
    """Refuse a file whose numbers were quantized, since the float model has more information."""
    kinds = {value: name for name, value in vars(schema.TensorType).items() if not name.startswith("_")}
    for subgraph in described.subgraphs:
        for tensor in subgraph.tensors:
            scale = tensor.quantization.scale if tensor.quantization is not None else None
            if kinds.get(tensor.type) in _QUANTIZED and scale is not None and len(scale):
                raise RefusedError(
                    "ModelError",
                    f"is quantized already (tensor {(tensor.name or b'').decode(errors='replace')!r} is "
                    f"{kinds[tensor.type].lower()})",
                    "Give the float model; Kedge quantizes it for each target",
                )


def _signature_names(described):
    """Return a tensor's index → its name in the file's only signature."""
    if len(described.signatureDefs or ()) != 1:
        return {}
    signature = described.signatureDefs[0]
    return {item.tensorIndex: item.name.decode() for item in (*(signature.outputs or ()), *(signature.inputs or ()))}


def _plain(name):
    return name.removeprefix("serving_default_").removesuffix(":0")


def _rename(model, inputs, outputs):
    """Give the graph's inputs and outputs the model's own names."""
    graph = model.graph
    if len(graph.input) != len(inputs) or len(graph.output) != len(outputs):
        raise RefusedError(
            "ModelError",
            f"tf2onnx made {len(graph.input)} inputs and {len(graph.output)} outputs of {len(inputs)} and "
            f"{len(outputs)}",
            "Leave out inputs that nothing depends on, or give an .onnx file",
        )
    changed = {}
    for value, name in zip((*graph.input, *graph.output), (*inputs, *outputs), strict=True):
        changed.setdefault(value.name, name)
    taken = set(changed.values())
    for node in graph.node:
        for names in (node.input, node.output):
            for at, name in enumerate(names):
                if name in changed:
                    names[at] = changed[name]
                elif name in taken:
                    names[at] = f"{name}__inner"
    for tensor in graph.initializer:
        if tensor.name in taken and tensor.name not in changed:
            tensor.name = f"{tensor.name}__inner"
    for value in (*graph.input, *graph.output):
        value.name = changed[value.name]
    del graph.value_info[:]


def _check_operators(model):
    """Refuse unknown operators; tf2onnx leaves them in the graph, under their own names."""
    import onnx

    for node in model.graph.node:
        if not node.domain and not onnx.defs.has(node.op_type):
            raise RefusedError(
                "UnsupportedOperatorError",
                f"operator {node.op_type!r} has no counterpart in ONNX",
                "Save the model with other operators in its place",
                node.name,
            )


def _compare(model, answers):
    """Compare graph and model on noise, with one sample, and with three if the batch is dynamic."""
    import numpy
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = numpy.random.default_rng(0)
    names = [value.name for value in model.graph.output]
    for samples in (1, 3):
        feed = {}
        for value in model.graph.input:
            tensor = value.type.tensor_type
            shape = [
                dim.dim_value if dim.dim_value > 0 else (samples if axis == 0 else _FREE)
                for axis, dim in enumerate(tensor.shape.dim)
            ]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            noise = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)
            feed[value.name] = noise.astype(dtype)
        try:
            wanted = answers(feed)
        except Exception as error:
            raise RefusedError(
                "ModelError", f"it cannot be run: {_one_line(error)}", "See that it runs where it was made"
            ) from error
        for name, mine in zip(names, session.run(names, feed), strict=True):
            theirs = wanted[name]
            same = mine.shape == theirs.shape
            apart = float(numpy.abs(mine.astype("f8") - theirs.astype("f8")).max(initial=0)) if same else float("inf")
            if not apart <= AGREES * max(1e-6, float(numpy.abs(theirs.astype("f8")).max(initial=0))):
                raise RefusedError(
                    "ModelError",
                    f"its ONNX graph does not compute what the model computes: output {name!r} is {apart:.2g} off",
                    "Export it to ONNX yourself and give the .onnx file",
                )


def _unconverted(error):
    return RefusedError(
        "ModelError",
        f"tf2onnx cannot convert it: {_one_line(error)}",
        "Export it to ONNX yourself and give the .onnx file",
    )


def _one_line(error):
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    return " ".join(lines)[:600]
