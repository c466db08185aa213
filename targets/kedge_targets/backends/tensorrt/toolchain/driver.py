"""Runs NVIDIA's ONNX parser and ahead-of-time builder in the toolchain's own environment: standard library and vendor
stack only, never Kedge. No GPU is needed or used.

Speaks the worker's protocol (docs/architecture.md): one JSON request per line on standard input, JSON lines of progress
and one answer on the file descriptor ``KEDGE_ANSWER_FD``. Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``parse_and_build``
    ``{"graph", "capabilities", "workspace_bytes", "profiles"}`` → ``{"accepted", "errors", "warnings", "layers",
    "engine_bytes", "seconds"}``. ``graph`` is an ONNX file, ``capabilities`` names GPUs (``SM86``), ``profiles`` holds
    for each input with free axes ``{"name", "minimum", "optimum", "maximum"}``. ``errors`` are ``{"node", "operator",
    "code", "what"}``: the parser's, or the builder's, whose node is known only if its message names it. What was built
    is measured and discarded: engines are made on the device only.

An error's ``kind`` is the name of a class in Kedge's hierarchy of errors.
"""

import re
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))

import driver_loop
from driver_loop import RefusedError

PACKAGES = ("tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu13-libs")

_WORDS = 400
# The library also reports that this machine has no GPU, which nobody asked.
_NOT_OURS = re.compile(
    r"catchCudaError|CUDA driver version is insufficient|CUDA initialization failure|no CUDA-capable"
)
_ECHO = re.compile(r"^ModelImporter\.cpp:\d+: ")


class Driver:
    """The state of the loop: the answer channel, and the vendor's logger (one per process, since the library keeps
    it)."""

    def __init__(self, answers):
        self.progress = answers.progress
        self._logger = None
        self._said = []

    def version(self, request):
        """Load the stack and return its versions."""
        self._library()
        return driver_loop.versions(PACKAGES)

    def parse_and_build(self, request):
        """Let the parser read a graph and the builder build it for each named GPU."""
        trt = self._library()
        self._said.clear()
        begun = time.perf_counter()
        self.progress("parse", 0, 1)
        builder = trt.Builder(self._logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._logger)
        parsed = parser.parse(Path(request["graph"]).read_bytes())
        answer = {
            "accepted": False,
            "errors": [_parse_error(parser.get_error(index)) for index in range(parser.num_errors)],
            "layers": network.num_layers,
            "engine_bytes": 0,
        }
        if parsed and not answer["errors"]:
            answer |= self._built(trt, builder, network, request)
        elif not answer["errors"]:
            answer["errors"] = [self._unnamed("the parser refuses the graph")]
        warnings = [text for severity, text in self._said if severity == "warning"]
        return {**answer, "warnings": warnings, "seconds": time.perf_counter() - begun}

    def _built(self, trt, builder, network, request):
        config = builder.create_builder_config()
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_bytes"])
        names = request["capabilities"]
        known = trt.ComputeCapability.__members__
        if unknown := [name for name in names if name not in known]:
            raise RefusedError(
                "ConfigError", f"unknown compute capability {unknown[0]!r}", remedy=f"Known are {', '.join(known)}"
            )
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(known[name], index)
        if request["profiles"]:
            profile = builder.create_optimization_profile()
            for item in request["profiles"]:
                profile.set_shape(item["name"], item["minimum"], item["optimum"], item["maximum"])
            config.add_optimization_profile(profile)
        self.progress("build", 0, 1)
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            return {"errors": [self._unnamed("the builder refuses the graph", network)]}
        return {"accepted": True, "engine_bytes": engine.nbytes}

    def _unnamed(self, otherwise, network=None):
        """Return an error that has no location except in the vendor's message; a layer named there is taken as its
        node."""
        words = "; ".join(text for severity, text in self._said if severity == "error")[:_WORDS] or otherwise
        layers = [] if network is None else [network.get_layer(index) for index in range(network.num_layers)]
        named = [layer for layer in layers if layer.name and re.search(rf"(?<!\w){re.escape(layer.name)}(?!\w)", words)]
        node = max((layer.name for layer in named), key=len, default="")
        return {"node": node, "operator": "", "code": "BUILD" if network is not None else "PARSE", "what": words}

    def _library(self):
        import tensorrt_rtx_bindings as trt

        if self._logger is None:
            self._logger = _logger(trt, self._said)
        return trt


def _logger(trt, said):
    class Logger(trt.ILogger):
        def log(self, severity, text):
            kind = {trt.ILogger.WARNING: "warning", trt.ILogger.ERROR: "error", trt.ILogger.INTERNAL_ERROR: "error"}
            if severity in kind and not _NOT_OURS.search(text) and not _ECHO.match(text):
                said.append((kind[severity], " ".join(text.split())[:_WORDS]))

    return Logger()


def _parse_error(error):
    """Return one of the parser's errors; its description begins with the node, followed by the reason on separate
    lines."""
    lines = [line.strip() for line in error.desc().splitlines() if line.strip() and not _NOT_OURS.search(line)]
    return {
        "node": error.node_name(),
        "operator": error.node_operator(),
        "code": error.code().name,
        "what": " ".join(lines)[:_WORDS],
    }


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver = Driver(answers)
    driver_loop.serve(answers, {"version": driver.version, "parse_and_build": driver.parse_and_build})


if __name__ == "__main__":
    main()
