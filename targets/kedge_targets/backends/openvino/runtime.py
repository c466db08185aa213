"""Loads a bundle's intermediate representation in OpenVINO and runs it."""

from __future__ import annotations

import logging
import queue
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kedge_protocol.errors import ConfigError, InputError, VerificationError
from kedge_targets import contract, refusal_remedies
from kedge_targets.backends.openvino import devices, emulation, library
from kedge_targets.calls import plan
from kedge_targets.contract import Array

if TYPE_CHECKING:
    from kedge_protocol.bundle.config import BundleConfig
    from kedge_targets.decoder.session import DecoderSession
    from kedge_targets.worker.progress import Progress

FUSED = "fused"
REFERENCE = "reference"
HALF = "half"

log = logging.getLogger(__name__)


class Runtime(contract.Runtime):
    """Runs models on OpenVINO's plugins; on ``CPU`` unless the options name another device.

    Options:
        device: OpenVINO's name, ``CPU``, ``GPU`` or ``NPU``. If a device other than the CPU is not available, or does
            not compile the model, the CPU runs it; a warning and the session's detail say why.
        threads: number of CPU threads for one call; 0 lets the library choose.
        precision: precision of everything that is not quantized; ``f32`` by default. OpenVINO's own choice is bf16 if
            the processor has it, so the same file would give different results from one device to the next. A GPU or an
            NPU needs ``f16``.
        streams: number of simultaneous calls; 0 for one.
        cache: whether to keep what the device compiled; true by default unless the device is a CPU.
    """

    distributions = ("openvino",)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``fused``: the library's own choice, integer kernels. ``reference``: low-precision
        transformations off, so that quantization is computed in float, as the graph defines it. ``half``: the same with
        each layer's result rounded to FP16, for devices that compute in it. With a kernel set, a CPU always runs the
        model.

        Measured on ic_resnet8 and kws_dscnn (int8): 2025.0, 2025.3 and 2026.4 give bit-identical results, and so does
        an emulated Haswell if the weights have 7 bits; threads, pinning, streams, snippets and execution mode change
        nothing. Only the degree of fusion remains to vary.
        """
        return (FUSED, REFERENCE, HALF)

    def kernel_sets_for(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """See :meth:`kedge_targets.contract.Runtime.kernel_sets_for`."""
        return (FUSED, REFERENCE) if devices.settings(options).on_cpu else self.kernel_sets

    def prepare(self, folder: Path, config: BundleConfig, *, cache: Path, progress: Progress) -> Mapping[str, Any]:
        """See :meth:`kedge_targets.contract.Runtime.prepare`: creates a folder for what the device compiles."""
        if not devices.settings(config.runtime_options).cache:
            return {}
        kept = devices.cache_folder(cache, config)
        return {} if kept is None else {devices.CACHE_DIR: str(kept)}

    def ways(self, options: Mapping[str, Any], cores: int) -> tuple[contract.Way, ...]:
        """See :meth:`kedge_targets.contract.Runtime.ways`: numbers of streams that share the cores. A device other than
        the CPU, and a bundle that says how many streams it wants, leave nothing to choose."""
        wanted = devices.settings(options)
        if not wanted.on_cpu or wanted.streams:
            return ()
        return tuple(
            contract.Way(options={"threads": threads * streams, "streams": streams}, calls=streams)
            for threads in plan.numbers_of_threads(cores)
            if (streams := cores // threads)
        )

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        wanted = devices.settings(options)
        if kernel_set not in (None, *self.kernel_sets):
            raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {', '.join(self.kernel_sets)}")
        openvino = library.load()
        core = openvino.Core()
        reason = ""
        if not wanted.on_cpu:
            if kernel_set is None:
                reason = devices.absent(core, wanted)
                if not reason:
                    try:
                        return _on_device(core, entry, wanted)
                    except Exception as error:  # noqa: BLE001 -- RuntimeError and its own, without a common base
                        reason = f"it does not take the model: {library.reason_of(error)}"
            wanted = wanted.for_cpu()
        try:
            compiled = _on_cpu(core, entry, wanted, kernel_set or FUSED)
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise _refused(openvino, entry, error) from error
        session = _session(compiled, wanted)
        if reason:
            asked = options["device"]
            log.warning("%s runs on the CPU and not on the %s: %s", entry.name, asked, reason)
            session.detail = f"the CPU, not the {asked}: {reason}"
        return session

    def load_decoder(
        self, entry: Path, options: Mapping[str, Any], *, slots: int, context: int, kernel_set: str | None = None
    ) -> DecoderSession:
        """See :meth:`kedge_targets.contract.Runtime.load_decoder`."""
        from kedge_targets.backends.openvino.decoder.session import OpenVinoDecoderSession, cut_to_kept, has_windows

        wanted = devices.settings(options).for_cpu()
        openvino = library.load()
        core = openvino.Core()
        settings = wanted.hints(devices.supported(core, devices.CPU))
        if kernel_set not in (None, FUSED):
            settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        try:
            model = core.read_model(str(entry))
            windows = has_windows(model)
            cut_to_kept(model)
            compiled = core.compile_model(model, devices.CPU, settings)
        except VerificationError:
            raise
        except Exception as error:  # the library raises RuntimeError and its own, without a common base
            raise _refused(openvino, entry, error) from error
        return OpenVinoDecoderSession(compiled, slots=slots, context=context, windows=windows)


def _refused(openvino: Any, entry: Path, error: Exception) -> VerificationError:
    return VerificationError(
        f"OpenVINO {openvino.__version__.split('-')[0]} refuses the file: {library.reason_of(error)}",
        where=entry.name,
        remedy=refusal_remedies.remedy(library.reason_of(error)),
    )


def _on_device(core: Any, entry: Path, wanted: devices.Settings) -> Session:
    hints = wanted.hints(devices.supported(core, wanted.device))
    compiled = core.compile_model(str(entry), wanted.device, hints)
    session = _session(compiled, wanted)
    session.detail = devices.described(compiled, wanted)
    return session


def _on_cpu(core: Any, entry: Path, wanted: devices.Settings, kernel_set: str) -> Any:
    settings = wanted.hints(devices.supported(core, devices.CPU))
    if kernel_set != FUSED:
        settings["LP_TRANSFORMS_MODE"] = "NO"
    if kernel_set != HALF:
        return core.compile_model(str(entry), devices.CPU, settings)
    model = core.read_model(str(entry))
    emulation.round_layers(model, emulation.HALF_BITS)
    return core.compile_model(model, devices.CPU, settings)


def _session(compiled: Any, wanted: devices.Settings) -> Session:
    return Streams(compiled, wanted.streams) if wanted.streams > 1 else Session(compiled)


class Session(contract.Session):
    """One loaded model with one inference request, for one thread at a time."""

    def __init__(self, compiled: Any) -> None:
        self._infer: Any = compiled.create_infer_request().infer
        self._compiled = compiled

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: OpenVINO refuses these arrays.
        """
        return _inferred(self._infer, inputs)

    def close(self) -> None:
        """Free the request and the model."""
        self._infer = _closed
        self._compiled = None


class Streams(Session):
    """One loaded model with several inference requests, for as many threads at once; further threads wait."""

    concurrent = True

    def __init__(self, compiled: Any, streams: int) -> None:
        super().__init__(compiled)
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for _ in range(streams):
            self._free.put(compiled.create_infer_request().infer)

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`Session.run`."""
        if self._compiled is None:
            _closed()
        infer = self._free.get()
        try:
            return _inferred(infer, inputs)
        finally:
            self._free.put(infer)


def _inferred(infer: Any, inputs: list[Array]) -> list[Array]:
    try:
        # The inputs are used in place; the outputs are copied, for the next call writes over them. By number, not as a
        # list: of a list the library asks first what its items are, which takes it 27 us.
        answer = infer(dict(enumerate(inputs)), share_inputs=True)
    except InputError:
        raise
    except Exception as error:  # the library raises RuntimeError and its own, without a common base
        raise InputError(f"OpenVINO cannot run these arrays: {library.reason_of(error)}") from error
    return list(answer.values())


def _closed(*_: object, **__: object) -> NoReturn:
    raise InputError("the model is closed")
