"""Compiles Myriad X blobs with OpenVINO 2021.4.2, in the toolchain's own environment: standard library and vendor stack
only, never Kedge.

Speaks the worker's protocol (docs/architecture.md): one JSON request per line on standard input, JSON lines of progress
and one answer on the file descriptor ``KEDGE_ANSWER_FD``. Tasks:

``version``
    ``{}`` → ``{"python", "packages"}``
``query``
    ``{"model"}`` → ``{"unsupported": [{"name", "type"}]}``: the layers of an ``.xml`` that the compiler does not take,
    in the graph's order, according to its own query.
``compile``
    ``{"model", "shaves", "folder"}`` → ``{"blobs": [{"shaves", "file", "inputs", "outputs", "stages"}]}``: one
    ``FOLDER/model-SHAVES.blob`` for each number of SHAVEs, each parsed by depthai.

The compiler has no interface of its own in the wheel: loading a network for the device waits five seconds for one,
compiles without it, writes the result to the cache, and then fails. It waits under a machine-wide lock, so three blobs
would take three times as long; see :func:`private_plugin`.

An error's ``kind`` is the name of a class in Kedge's hierarchy of errors.
"""

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from xml.etree import ElementTree

sys.path.append(str(Path(__file__).resolve().parents[3] / "toolchain" / "driver_side"))

import driver_loop
from driver_loop import RefusedError

PACKAGES = ("depthai", "numpy")
LIBUSB = "libusb-1.0.so.0"
PLUGIN = "libmyriadPlugin.so"
PLUGINS = "plugins.xml"

# Of a blob: an ELF name of 34 bytes and padding, then a magic number and the whole size, little-endian
# (inference-engine/src/vpu/graph_transformer, blob_format.hpp, of 2021.4).
MAGIC = 9709
HEADER = struct.Struct("<II")
HEADER_AT = 52
ELF = b"\x7felf"

LOCK = b"/tmp/mvnc.mutex"
OWN_LOCK = b"././././vpulock"

TICK = 0.02  # seconds between two looks at the cache
INTEGERS = {"I8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}


def check_libusb():
    """Check that libusb is there. The plugin cannot be loaded without it, but does not say why."""
    try:
        ctypes.CDLL(LIBUSB)
    except OSError as error:
        raise RefusedError(
            "ToolchainError",
            f"the Myriad plugin needs {LIBUSB}, which cannot be loaded: {error}",
            remedy="Install libusb 1.0: apt-get install libusb-1.0-0, or dnf install libusb1",
        ) from error


def version(request):
    """Load the stack and return its versions."""
    check_libusb()
    import depthai  # noqa: F401
    import openvino
    from openvino.inference_engine import IECore

    found = IECore().get_versions("MYRIAD")
    if "MYRIAD" not in found:
        raise RefusedError("ToolchainError", f"OpenVINO finds no Myriad plugin, only {sorted(found)}")
    return driver_loop.versions((openvino.__name__, *PACKAGES))


def read(core, model):
    """Read the network of an ``.xml`` with its ``.bin``."""
    path = Path(model)
    try:
        return core.read_network(str(path), str(path.with_suffix(".bin")))
    except Exception as error:
        traceback.print_exc()
        raise RefusedError("LoweringError", f"OpenVINO 2021.4 cannot read the graph: {one_line(error)}") from error


def query(request):
    """Return the layers that the compiler does not take."""
    check_libusb()
    import ngraph
    from openvino.inference_engine import IECore

    core = IECore()
    network = read(core, request["model"])
    try:
        taken = core.query_network(network, "MYRIAD")
    except Exception as error:
        traceback.print_exc()
        raise RefusedError("LoweringError", f"the Myriad compiler cannot judge the graph: {one_line(error)}") from error
    layers = [
        {"name": node.get_friendly_name(), "type": node.get_type_name()}
        for node in ngraph.function_from_cnn(network).get_ordered_ops()
    ]
    # Results are no layers to it.
    return {"unsupported": [layer for layer in layers if layer["name"] not in taken and layer["type"] != "Result"]}


def compile_all(request):
    """Compile one blob for each number of SHAVEs, all in parallel."""
    check_libusb()
    folder = Path(request["folder"])
    plugin = folder / ".plugin"
    running = []
    try:
        private_plugin(plugin)
        for shaves in request["shaves"]:
            running.append(Compilation(request["model"], shaves, folder, plugin))
        while [one for one in running if not one.done()]:
            time.sleep(TICK)
    finally:
        for one in running:
            one.end()
        shutil.rmtree(plugin, ignore_errors=True)
    return {"blobs": [one.described() for one in running]}


def private_plugin(folder):
    """Make a copy of the plugin, and a list of plugins that names it, in a new folder.

    The plugin waits for a device under a lock on ``/tmp/mvnc.mutex``, which all users of the machine share and only its
    creator may open. The copy locks a file in its working folder, and each compilation has a folder of its own. If the
    plugin cannot be changed this way, the copy is unchanged, which is merely slower.
    """
    import openvino

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    raw = (Path(openvino.__path__[0]) / "libs" / PLUGIN).read_bytes()
    if raw.count(LOCK + b"\0") == 1:
        raw = raw.replace(LOCK + b"\0", OWN_LOCK + b"\0")
    (folder / PLUGIN).write_bytes(raw)
    plugins = ElementTree.Element("ie")
    ElementTree.SubElement(
        ElementTree.SubElement(plugins, "plugins"), "plugin", name="MYRIAD", location=str(folder / PLUGIN)
    )
    (folder / PLUGINS).write_bytes(ElementTree.tostring(plugins))


class Compilation:
    """One process that compiles one blob."""

    def __init__(self, model, shaves, folder, plugin):
        self.shaves = shaves
        self.file = folder / f"model-{shaves}.blob"
        self._cache = folder / f".cache-{shaves}"
        shutil.rmtree(self._cache, ignore_errors=True)
        self._cache.mkdir()
        self._blob = None
        self._said = self._cache / "said.txt"
        command = [sys.executable, str(Path(__file__).resolve()), "--compile", model, str(shaves), str(plugin)]
        import openvino

        libraries = str(Path(openvino.__path__[0]) / "libs")
        with self._said.open("wb") as said:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=said,
                cwd=self._cache,
                env={**os.environ, "LD_LIBRARY_PATH": libraries},
            )

    def done(self):
        """Return whether the blob is complete; raise if there will be none."""
        if self._blob is None:
            ended = self._process.poll() is not None
            self._blob = whole_blob(self._cache)
            if self._blob is None and ended:
                said = self._said.read_text(encoding="utf-8", errors="replace")
                words = [line[len(FAILED) :] for line in said.splitlines() if line.startswith(FAILED)]
                raise RefusedError(
                    "LoweringError",
                    "the Myriad compiler failed for {} SHAVEs: {}".format(
                        self.shaves, words[-1] if words else f"it ended with status {self._process.returncode}"
                    ),
                )
        return self._blob is not None

    def end(self):
        """End the process and remove everything but the blob."""
        self._process.kill()
        self._process.wait()
        if self._blob is not None:
            self.file.write_bytes(self._blob)
        shutil.rmtree(self._cache, ignore_errors=True)

    def described(self):
        """Return what depthai reads in the blob."""
        import depthai

        try:
            blob = depthai.OpenVINO.Blob(str(self.file))
        except Exception as error:
            raise RefusedError(
                "LoweringError", f"depthai cannot parse the blob for {self.shaves} SHAVEs: {one_line(error)}"
            ) from error
        return {
            "shaves": blob.numShaves,
            "file": str(self.file),
            "inputs": [described_tensor(name, info) for name, info in blob.networkInputs.items()],
            "outputs": [described_tensor(name, info) for name, info in blob.networkOutputs.items()],
            "stages": blob.stageCount,
        }


def described_tensor(name, info):
    """Describe a tensor, with the axes in memory order, slowest first."""
    return {"name": name, "shape": list(reversed(info.dims)), "dtype": info.dataType.name, "order": info.order.name}


def whole_blob(cache):
    """Return the blob in the cache, without the line of XML before it, or None as long as it is missing or
    incomplete."""
    for path in cache.glob("*.blob"):
        raw = path.read_bytes()
        blob = raw[raw.find(b"\n") + 1 :]
        if len(blob) < HEADER_AT + HEADER.size or not blob.startswith(ELF):
            return None
        magic, size = HEADER.unpack_from(blob, HEADER_AT)
        return blob if magic == MAGIC and size == len(blob) else None
    return None


FAILED = "failed: "


def compile_one(model, shaves, plugin):
    """Compile, letting the plugin wait in vain for a device; runs in a separate process in the folder of its cache."""
    from openvino.inference_engine import IECore

    core = IECore(str(Path(plugin) / PLUGINS))
    network = read(core, model)
    # Inputs and outputs travel as the device computes; it would convert them otherwise.
    for info in network.input_info.values():
        info.precision = wire_type(info.precision)
    for info in network.outputs.values():
        info.precision = wire_type(info.precision)
    core.set_config({"CACHE_DIR": str(Path.cwd())}, "")
    try:
        core.load_network(
            network,
            "MYRIAD",
            {
                "VPU_MYRIAD_PLATFORM": "VPU_MYRIAD_2480",
                "MYRIAD_NUMBER_OF_SHAVES": shaves,
                "MYRIAD_NUMBER_OF_CMX_SLICES": shaves,
                "MYRIAD_THROUGHPUT_STREAMS": "1",
            },
        )
    except RuntimeError as error:
        print(FAILED + one_line(error), flush=True)


def wire_type(precision):
    """Return the precision with which an input or output is transferred, given its precision in the graph."""
    return "I32" if precision in INTEGERS else "U8" if precision == "U8" else "FP16"


def one_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:600] or type(error).__name__


def main():
    """Serve requests until the worker closes the pipe."""
    answers = driver_loop.Answers()
    driver_loop.serve(answers, {"version": version, "query": query, "compile": compile_all})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        try:
            compile_one(*sys.argv[2:])
        except RefusedError as refused:
            print(FAILED + str(refused), flush=True)
    else:
        main()
