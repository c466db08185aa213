"""Converts ONNX to .tflite, in the toolchain's own environment: standard library and vendor stack only, never Kedge.

Speaks the worker's protocol (docs/architecture.md): one JSON request per line on standard input, JSON lines of progress
and one answer on the file descriptor ``KEDGE_ANSWER_FD``. Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``convert``
    ``{"graph", "keep", "plain", "precision", "file", "calibration", "samples", "group", "orders", "floating", "wide",
    "guard"}`` → ``{"inputs", "outputs", "input_order", "samples", "operators", "float_operators", "minimum_runtime",
    "seconds", "floating", "decibels"}``. ``graph`` is an ONNX file with fixed shapes, ``keep`` the inputs whose axes
    must stay, ``plain`` whether Kedge's own converter (``plainly.py`` in this folder) replaces onnx2tf, ``precision``
    ``float32``, ``float16``, ``int8-dynamic`` or ``int8``. For the last ``calibration`` names for each input an
    ``.npy`` of samples in the file's layout, ``group`` is the batch, ``orders`` is the permutation of each graph
    input's axes for the file, ``floating`` names nodes of the graph that stay in float, ``wide`` nodes whose
    activations get 16 bits, and ``guard`` says whether more than a small share of the weights may stay in float if an
    output would not be accurate enough otherwise; the answer has the other nodes that stay in float, and each output's
    dB against the float file on calibration samples. The graph is converted to a TensorFlow model once, calibrated
    once, and kept for further calls.
``read``
    ``{"model", "graph"}`` → ``{"notes", "packages"}``. ``model`` is a SavedModel's folder or a float ``.tflite``,
    ``graph`` the ONNX file to write; see ``reading.py`` in this folder.

An error's ``kind`` is the name of a class in Kedge's hierarchy of errors.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import re
import sys
import time
import traceback
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))

import driver_loop
from driver_loop import RefusedError

PACKAGES = ("tensorflow-cpu", "onnx2tf", "onnx", "numpy", "ai-edge-litert")

# Beyond the standard: what Kedge itself puts into the graph.
CONTRIBUTED = {("com.microsoft", "Gelu")}

# No operator of TFLite: onnx2tf builds it of others.
PSEUDO = ["erf"]

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

_OTHERWISE = "Export the model with other operators in its place, or choose a target with another backend"

_LONGEST = 240  # characters of a vendor's message


class Driver:
    """The state of the loop: the answer channel, and the models made so far."""

    def __init__(self, answers):
        self.progress = answers.progress
        self._key = None
        self._model = None
        self._raw, self._plain = b"", False
        self._traced = None  # the model as a TensorFlow function
        self._float = {}  # precision → file of the model that is kept, where no calibration enters
        self._seconds = 0.0
        self._calibration = None  # what the quantizer was calibrated on
        self._quantizer = None
        self._matching = None

    def version(self, request):
        """Load the stack and return its versions."""
        import onnx2tf  # noqa: F401
        import tensorflow  # noqa: F401

        return driver_loop.versions(PACKAGES)

    def convert(self, request):
        """Convert a graph to one .tflite."""
        import describing

        model = self._model_of(Path(request["graph"]), request["keep"], request["plain"])
        begun = time.perf_counter()
        if request["precision"] == "int8":
            content, more = self._static(model, request)
        else:
            content, more = self._content(model, request["precision"]), {"samples": 0}
        Path(request["file"]).write_bytes(content)
        seconds = {"graph": self._seconds, "convert": time.perf_counter() - begun}
        return {**describing.described(content, self._content(model, "float32")), **more, "seconds": seconds}

    def _content(self, model, precision):
        """Return the file for a precision that needs no calibration."""
        if precision not in self._float:
            self.progress("converting", 0, 0)
            try:
                if self._traced is None:
                    self._traced = _traced(model)
                converter = _converter(model, self._traced)
                _set_precision(converter, precision)
                self._float[precision] = converter.convert()
            except RefusedError:
                raise
            except Exception as error:
                traceback.print_exc()
                node = _culprit(self._raw) if precision == "float32" and not self._plain else None
                raise _converter_refused(error, node) from error
        return self._float[precision]

    def _static(self, model, request):
        """Return the int8 file, and its part of the answer."""
        import matching
        import quantizing

        content = self._content(model, "float32")
        calibration = _digest(request["calibration"])
        try:
            if self._quantizer is None or self._calibration != calibration:
                self._matching = self._quantizer = None
                self._quantizer = quantizing.Quantizer(content, lambda: _samples(request, self.progress))
                self._calibration = calibration
            # The files' names change from call to call.
            self._quantizer.groups = lambda: _samples(request, _silent)
            asked = self._operators(matching, content, request, request["floating"])
            both = asked | self._operators(matching, content, request, request["wide"])
            # What lies around a layer (a pad) has no kernels of 16 bits everywhere: it stays in float.
            wide = {at for at in both - asked if self._quantizer.can_widen(at)}
            if request["wide"] and not wide:
                raise RefusedError(
                    "LoweringError",
                    "none of the layers that want activations of 16 bits can have them",
                    where=f"node {request['wide'][0]!r}",
                    remedy="Keep it in float; convolutions and matrix products with weights of their own can",
                )
            made, floating, decibels = self._quantizer.quantized(both - wide, request["guard"], wide)
            besides = self._nodes(matching, content, request, floating - both) if floating - both else []
        except RefusedError:
            raise
        except Exception as error:
            traceback.print_exc()
            raise _converter_refused(error) from error
        return made, {"samples": request["samples"], "floating": besides, "decibels": decibels}

    def _matched(self, matching, content, request):
        """Return the matching of the graph with its float file, both run on the first samples."""
        import describing
        import numpy
        import onnx

        if self._matching is None:
            given = next(_samples(request, _silent))
            names = [item["name"] for item in describing.interpreter(content).get_input_details()]
            graph = onnx.load_from_string(self._raw)
            feed = {}
            order_of = describing.input_order(names)
            for value, at, order in zip(graph.graph.input, order_of, request["orders"], strict=True):
                feed[value.name] = numpy.ascontiguousarray(given[at].transpose(numpy.argsort(order)))
            self._matching = matching.Matching(graph, feed, content, given)
        return self._matching

    def _operators(self, matching, content, request, names):
        """Return the indices of the operators that do the work of these nodes."""
        if not names:
            return set()
        found = self._matched(matching, content, request)
        nodes = {node.name: node for node in found.graph.graph.node}
        operators = set()
        for name in names:
            mine = found.operators(nodes[name])
            # Others round little, and lie between layers that are told apart.
            if not mine and nodes[name].op_type in _LAYERS:
                raise RefusedError(
                    "LoweringError",
                    "the layer cannot be told from others in the converted file, so it alone cannot differ from int8",
                    where=f"node {name!r}",
                    remedy="Leave it out of the plan's layers, or name the layer before or behind it as well",
                )
            operators |= mine
        return operators | found.comparisons(operators)

    def _nodes(self, matching, content, request, operators):
        """Return the names of the graph's nodes that these operators belong to; they only inform the user, so errors
        are ignored."""
        try:
            return self._matched(matching, content, request).nodes(operators)
        except Exception:  # noqa: BLE001 -- a file without these names is better than none
            traceback.print_exc()
            return []

    def read(self, request):
        """Convert a TensorFlow model to an ONNX graph."""
        import reading

        self.progress("reading the model", 0, 0)
        try:
            return reading.read(request["model"], request["graph"])
        except reading.RefusedError as error:
            traceback.print_exc()
            where = f"{request['model']}: node {error.node!r}" if error.node else request["model"]
            raise RefusedError(error.kind, error.what, where, error.remedy) from error

    def _model_of(self, graph, keep, plain):
        """Return the TensorFlow model of a graph; the last one is kept."""
        raw = graph.read_bytes()
        key = hashlib.sha256(raw + json.dumps([sorted(keep), plain]).encode()).hexdigest()
        if key != self._key:
            self.progress("reading the graph", 0, 0)
            begun = time.perf_counter()
            self._key = self._model = self._traced = None
            self._float = {}
            self._quantizer = self._matching = self._calibration = None
            self._model = _plainly(raw, keep) if plain else _from_onnx(raw, keep)
            self._key, self._raw, self._plain = key, raw, plain
            self._seconds = time.perf_counter() - begun
        return self._model


def _from_onnx(raw, keep):
    """Convert an ONNX graph to a Keras model: activations NHWC, inputs in the graph's order."""
    import onnx

    model = onnx.load_from_string(raw)
    _check_operators(model)
    try:
        made = _by_onnx2tf(model, keep)
    except BaseException as error:  # it also leaves by sys.exit()
        traceback.print_exc()
        by_name = {each.name: each for each in model.graph.node}
        node = by_name.get(getattr(error, "onnx_op_name", None)) or _culprit(raw)
        raise RefusedError(
            "LoweringError",
            f"onnx2tf cannot convert {node.op_type if node else 'the graph'}: {_one_line(error)}",
            where=f"node {node.name!r}" if node else None,
            remedy=_OTHERWISE,
        ) from error
    if len(made.inputs) != len(model.graph.input) or len(made.outputs) != len(model.graph.output):
        raise RefusedError(
            "LoweringError",
            f"onnx2tf made {len(made.inputs)} inputs and {len(made.outputs)} outputs of "
            f"{len(model.graph.input)} and {len(model.graph.output)}",
        )
    return made


def _by_onnx2tf(model, keep):
    import numpy
    import onnx2tf
    import onnx2tf.onnx2tf as inner
    import tf_keras

    # Layer names are counted through a process's life and end in the file: count anew, so that equal graphs give
    # equal files.
    tf_keras.backend.clear_session()
    # It would fetch pictures from the network for its own checks; noise does as well.
    noise = numpy.random.default_rng(0).random((20, 128, 128, 3), dtype=numpy.float32)
    inner.download_test_image_data = lambda: noise
    return onnx2tf.convert(
        # No file is given, so none is rewritten in place.
        input_onnx_file_path=None,
        onnx_graph=model,
        output_folder_path=str(Path.cwd() / "onnx2tf"),
        not_use_onnxsim=True,
        not_use_opname_auto_generate=True,
        output_signaturedefs=True,
        keep_shape_absolutely_input_names=list(keep) or None,
        replace_to_pseudo_operators=PSEUDO,
        disable_model_save=True,
        verbosity="error",
    )


def _culprit(raw):
    """Return the node that cannot be converted alone either; None if there is none."""
    import blaming
    import onnx

    def converts(alone):
        model = _by_onnx2tf(onnx.load_from_string(alone), [])
        _converter(model, _traced(model)).convert()

    try:
        return blaming.culprit(onnx.shape_inference.infer_shapes(onnx.load_from_string(raw)), converts)
    except Exception:  # noqa: BLE001 -- the first error is the one to report
        traceback.print_exc()
        return None


def _plainly(raw, keep):
    """Convert with Kedge's own converter, which knows fewer operators but every axis."""
    import onnx
    import plainly

    try:
        return plainly.Model(onnx.load_from_string(raw), keep)
    except plainly.RefusedError as error:
        raise _node_refused(error) from error


def _node_refused(error):
    said = _one_line(error).removeprefix("RefusedError: ")
    whole = said if "cannot be converted" in said else f"{error.node.op_type} cannot be converted: {said}"
    return RefusedError(
        "LoweringError",
        whole,
        where=f"node {error.node.name!r}",
        remedy=_OTHERWISE,
    )


def _check_operators(model):
    """Refuse an operator that onnx2tf has no module for, naming it, before onnx2tf fails on it."""
    for node in model.graph.node:
        standard = node.domain in ("", "ai.onnx")
        known = standard or (node.domain, node.op_type) in CONTRIBUTED
        if not known or importlib.util.find_spec(f"onnx2tf.ops.{node.op_type}") is None:
            name = node.op_type if standard else f"{node.domain}.{node.op_type}"
            raise RefusedError(
                "UnsupportedOperatorError",
                f"the operator {name} cannot be converted",
                where=f"node {node.name!r}",
                remedy="Export the model without it, or choose a target with another backend",
            )


def _traced(model):
    import plainly
    import tensorflow as tf

    signature = [
        tf.TensorSpec(tensor.shape, tensor.dtype, name=f"input_{index}") for index, tensor in enumerate(model.inputs)
    ]
    plain = isinstance(model, plainly.Model)
    function = tf.function(lambda *inputs: model(inputs), input_signature=signature, autograph=not plain)
    try:
        return function.get_concrete_function()
    except plainly.RefusedError as error:
        raise _node_refused(error) from error


def _converter(model, traced):
    import plainly
    import tensorflow as tf

    # The converter saves what holds the weights, and a Keras model is traced anew for that: five times the work.
    holder = tf.Module()
    holder.kept = [] if isinstance(model, plainly.Model) else list(model.variables)
    return tf.lite.TFLiteConverter.from_concrete_functions([traced], holder)


def _set_precision(converter, precision):
    """Set the converter's number format."""
    import tensorflow as tf

    if precision == "float16":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.target_spec.supported_types = [tf.float16]
    elif precision == "int8-dynamic":
        # Without samples it stores weights of 8 bits, and kernels find the range of what they multiply in each call.
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    elif precision != "float32":
        raise RefusedError("LoweringError", f"unknown precision {precision!r}")


def _samples(request, progress):
    """Yield the representative data set, reading it as it is used."""
    import numpy

    arrays = [numpy.load(path, mmap_mode="r") for path in request["calibration"]]
    group = request["group"]
    total = request["samples"]
    for start in range(0, total - group + 1, group):
        yield [numpy.ascontiguousarray(array[start : start + group]) for array in arrays]
        progress("calibrating", start + group, total)


def _silent(what, done, total):
    """Ignore progress."""


def _digest(paths):
    """Return the digest of all the files' bytes."""
    found = hashlib.sha256()
    for path in paths:
        with Path(path).open("rb") as file:
            while chunk := file.read(1 << 22):
                found.update(chunk)
    return found.hexdigest()


def _converter_refused(error, culprit=None):
    text = str(error)
    kind, node = "LoweringError", None
    place = f"node {culprit.name!r}" if culprit else None
    marker = " op is neither a custom op nor a flex op"
    if marker in text:
        before = text.partition(marker)[0]
        kind = "UnsupportedOperatorError"
        node = before.rpartition("'")[0].rpartition("'")[2]
    if node:
        said = f"TFLite has no operator {node}" + (f" for {culprit.op_type}" if culprit else "")
        return RefusedError(kind, said, where=place or f"operator {node!r}", remedy=_OTHERWISE)
    what = culprit.op_type if culprit else "the model"
    return RefusedError(kind, f"TensorFlow cannot convert {what}: {_one_line(error)}", place, _OTHERWISE)


def _one_line(error):
    """Return the vendor's own message, without the tables of numbers and the call stacks in it."""
    lines = [line.strip() for line in f"{type(error).__name__}: {error}".splitlines() if line.strip()]
    text = re.split(r"\s\S*:\d+:\d+: note: |\scalled from|\snote: loc", " ".join(lines))[0]
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours
    text = re.sub(r"[\[({](?:[\s\d.,;eE+\-\[\](){}]|nan|inf){24,}[\])}]", "[…]", text)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST].rsplit(' ', 1)[0]} …"


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver = Driver(answers)
    driver_loop.serve(answers, {"version": driver.version, "convert": driver.convert, "read": driver.read})


if __name__ == "__main__":
    main()
