"""Describes the actual content of a ``.tflite``: tensors, operators, the oldest runtime that takes it."""

import re


def interpreter(content):
    """Return an interpreter whose inputs and outputs have the file's own dtypes."""
    from ai_edge_litert.interpreter import Interpreter, OpResolverType

    interpreter = Interpreter(
        model_content=content,
        experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    )
    interpreter.allocate_tensors()
    return interpreter


def described(content, float_content):
    """Describe what the file contains. Operators that stayed in float have the same versions as in the float file."""
    opened = interpreter(content)
    details = {item["index"]: item for item in opened.get_tensor_details()}
    operators = [item for item in opened._get_ops_details() if item["op_name"] not in ("QUANTIZE", "DEQUANTIZE")]
    in_float = [
        item["op_name"]
        for item in operators
        if any(details[index]["dtype"].__name__ == "float32" for index in item["outputs"] if index in details)
    ]
    names = [item["name"] for item in opened.get_input_details()]
    return {
        "input_order": input_order(names),
        "minimum_runtime": max(_minimum_runtime(content), _minimum_runtime(float_content), key=_version),
        "inputs": [_tensor(item) for item in opened.get_input_details()],
        "outputs": [_tensor(item) for item in opened.get_output_details()],
        "operators": len(operators),
        "float_operators": sorted(in_float),
    }


def input_order(names):
    """Return the position in the file of each input of the graph; ``_converter`` has named them by number."""
    numbers = [int(re.search(r"input_(\d+)", name).group(1)) for name in names]
    return [numbers.index(number) for number in range(len(numbers))]


def _minimum_runtime(content):
    """Return what TensorFlow wrote as ``min_runtime_version``: the first release that has all operators' versions."""
    from ai_edge_litert import schema_py_generated as schema

    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    for item in model.metadata or ():
        if item.name == b"min_runtime_version":
            return bytes(model.buffers[item.buffer].data).rstrip(b"\0").decode(errors="replace")
    return ""


def _version(text):
    return [int(part) for part in text.split(".") if part.isdigit()]


def _tensor(item):
    scale, zero_point = item["quantization"]
    return {
        "name": item["name"],
        "shape": [int(size) for size in item["shape"]],
        "dtype": item["dtype"].__name__,
        "scale": float(scale) if scale else None,
        "zero_point": int(zero_point) if scale else None,
    }
