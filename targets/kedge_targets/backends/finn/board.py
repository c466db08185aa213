"""Runs the accelerator on a board: FINN's own driver on top of PYNQ.

Only one bitstream at a time is in the fabric, and several processes may need it: the agent verifies a new bundle while
the old one serves, and applications load models of their own. So each process takes a lock for each call, and reloads
its bitstream if another's is loaded.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_protocol import digest, files
from kedge_protocol.errors import MissingDependencyError, StorageError, VerificationError

Array = npt.NDArray[Any]

DISTRIBUTION = "finn-plus-driver"
LOCK = "KEDGE_FABRIC_LOCK"
"""Environment variable: the file whose lock protects the fabric."""

_BUFFER_BYTES = 4 << 20
_LARGEST_BATCH = 256
_CONTAINERS = {"INT8": np.int8, "UINT8": np.uint8}
"""Types that the driver packs without handling single bits; it takes all others as float32."""
_DRIVER = "finn_plus_driver.overlays.dma"
_INSTALL = f"pip install --no-deps {DISTRIBUTION} qonnx; bitstring beside them, pynq is part of the board's image"


class Accelerator:
    """A bitfile in the fabric, for one thread at a time; a lock excludes other processes.

    Args:
        bitfile: path of the ``.bit``, with its ``.hwh`` beside it.
        settings: path of ``settings.json`` from FINN's deployment package, which configures its driver.
        shapes: shapes of one input sample and one output sample, as in the streamlined graph.

    Raises:
        MissingDependencyError: there is no driver, no PYNQ, or no device.
        VerificationError: the bitfile or its settings are refused, or they belong to another graph.
    """

    def __init__(self, bitfile: Path, settings: Path, shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
        overlay_class = _driver()
        information = _information(settings)
        _require_shapes(information, shapes, settings.name)
        self._fabric = _Fabric(digest.of_file(bitfile))
        folders = {
            "runtime_weight_dir": str(bitfile.parent / "runtime_weights"),
            "mlo_weight_dir": str(bitfile.parent / "mlo_weights"),
        }
        with self._fabric.held():
            try:
                self._overlay = overlay_class(str(bitfile), **{**information, **folders, "batch_size": 1})
            except Exception as error:  # PYNQ and the driver raise whatever comes
                raise VerificationError(
                    f"the board refuses it: {_words(error)}",
                    where=bitfile.name,
                    remedy="Build the bitfile for this board; PYNQ needs root and the board's own image",
                ) from error
            self._fabric.mark()
        self._container = _CONTAINERS.get(self._overlay.idt().name, np.float32)
        sizes = [int(np.prod(shape)) for shape in (self._overlay.ishape_packed(), self._overlay.oshape_packed())]
        self.batch = max(1, min(_LARGEST_BATCH, _BUFFER_BYTES // max(sizes)))
        """Largest number of samples in one call."""
        self.clock_mhz = float(self._overlay.fclk_mhz_actual)

    def run(self, samples: Array) -> Array:
        """Run a batch of at most :attr:`batch` samples [batch, …]; the result is float32 and owned by the caller.

        Raises:
            VerificationError: the driver fails.
        """
        given = np.ascontiguousarray(samples, dtype=self._container)
        with self._in_fabric():
            try:
                if self._overlay.batch_size != len(given):
                    self._overlay.batch_size = len(given)
                answer = self._overlay.execute(given)
            except Exception as error:  # as above
                raise VerificationError(f"FINN's driver fails: {_words(error)}") from error
        return np.asarray(answer, dtype=np.float32)

    def throughput(self) -> dict[str, float]:
        """Run FINN's own throughput test at the largest batch: samples per second, its duration in ms, MB per second in
        and out, MHz."""
        with self._in_fabric():
            try:
                self._overlay.batch_size = self.batch
                measured = self._overlay.throughput_test()
            except Exception as error:  # as above
                raise VerificationError(f"FINN's throughput test fails: {_words(error)}") from error
        names = {
            "throughput[images/s]": "samples_per_second",
            "runtime[ms]": "runtime_ms",
            "DRAM_in_bandwidth[MB/s]": "in_mb_per_second",
            "DRAM_out_bandwidth[MB/s]": "out_mb_per_second",
            "batch_size": "batch",
        }
        found = {ours: round(float(measured[theirs]), 4) for theirs, ours in names.items() if theirs in measured}
        return {**found, "clock_mhz": self.clock_mhz}

    def close(self) -> None:
        """Release the buffers; the bitstream stays in the fabric until another is needed."""
        with contextlib.suppress(AttributeError):
            self._overlay.ibuf_packed_device = self._overlay.obuf_packed_device = None
        self._fabric.close()

    @contextlib.contextmanager
    def _in_fabric(self) -> Iterator[None]:
        with self._fabric.held():
            if not self._fabric.ours():
                try:
                    self._overlay.download()
                    self._overlay.load_runtime_weights()
                except Exception as error:  # as above
                    raise VerificationError(f"the bitstream cannot be put back: {_words(error)}") from error
            # Whoever finds no mark (this process died in the middle) starts from a fresh bitstream.
            self._fabric.clear()
            yield
            self._fabric.mark()


class _Fabric:
    """The lock, and the mark of the fabric's content: the bitfile's digest, in the locked file."""

    def __init__(self, bitfile_digest: str) -> None:
        path = Path(os.environ.get(LOCK) or Path(tempfile.gettempdir()) / "kedge-fabric.lock")
        try:
            self._handle = files.open_lock(path, mode=0o600)
        except OSError as error:
            raise StorageError(
                f"cannot be opened: {error.strerror}",
                where=str(path),
                remedy=f"All processes that use the fabric must be of one user, or name a file of theirs in {LOCK}",
            ) from error
        self._mark = bitfile_digest.encode()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock."""
        files.lock(self._handle)
        try:
            yield
        finally:
            files.unlock(self._handle)

    def ours(self) -> bool:
        """Return whether this bitfile is in the fabric."""
        return os.pread(self._handle, len(self._mark) + 1, 0) == self._mark

    def mark(self) -> None:
        """Record that this bitfile is in the fabric, and idle."""
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, self._mark, 0)

    def clear(self) -> None:
        """Record that the state of the fabric is unknown."""
        os.ftruncate(self._handle, 0)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def _driver() -> Any:
    """Return FINN's driver for one input DMA and one output DMA.

    Raises:
        MissingDependencyError: the driver or PYNQ is missing, or PYNQ finds no device.
    """
    try:
        pynq = importlib.import_module("pynq")
        devices = getattr(getattr(pynq, "Device", None), "devices", None)
    except Exception as error:  # PYNQ raises whatever comes where there is no board
        raise MissingDependencyError(f"PYNQ cannot be loaded ({_words(error)})", remedy=_INSTALL) from error
    if devices is not None and not devices:
        raise MissingDependencyError("PYNQ finds no device", remedy="Run the agent as root on the board")
    try:
        with _without_onnx():
            return importlib.import_module(_DRIVER).FINNDMAOverlay
    except Exception as error:  # what a vendor's import raises
        raise MissingDependencyError(f"{DISTRIBUTION} cannot be loaded ({_words(error)})", remedy=_INSTALL) from error


@contextlib.contextmanager
def _without_onnx() -> Iterator[None]:
    """Provide a placeholder for onnx if it is missing, inside the block only. QONNX's module of data types, which the
    driver needs, imports two names of onnx only for annotations, and there is no onnx for 32-bit ARM."""
    try:
        importlib.import_module("onnx")
    except ImportError:
        pass
    else:
        yield
        return
    placeholder = types.ModuleType("onnx")
    placeholder.GraphProto = placeholder.ModelProto = object  # type: ignore[attr-defined]
    sys.modules["onnx"] = placeholder
    try:
        yield
    finally:
        del sys.modules["onnx"]


def _information(settings: Path) -> dict[str, Any]:
    try:
        information = json.loads(settings.read_bytes())["driver_information"]
        kind = information["driver_type"]
        counts = information["io_shape_dict"]["num_inputs"], information["io_shape_dict"]["num_outputs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VerificationError(
            f"is not the settings of FINN's driver: {_words(error)}", where=settings.name
        ) from error
    if kind != "FINNDMAOverlay" or counts != (1, 1):
        raise VerificationError(
            f"the design is for {kind} with {counts[0]} inputs and {counts[1]} outputs",
            where=settings.name,
            remedy="Build it for FINNDMAOverlay, with one input and one output",
        )
    return dict(information)


def _require_shapes(
    information: Mapping[str, Any], shapes: tuple[tuple[int, ...], tuple[int, ...]], where: str
) -> None:
    for key, shape in zip(("ishape_normal", "oshape_normal"), shapes, strict=True):
        found = tuple(information["io_shape_dict"][key][0])[1:]
        if found != shape:
            raise VerificationError(
                f"its {key} is {found}, the streamlined graph has {shape}",
                where=where,
                remedy="Build the bitfile of this bundle's own files",
            )


def _words(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
