"""Loads a bundle's ``.onnx`` in ONNX Runtime on a CPU, and runs it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import ConfigError, InputError, VerificationError
from kedge_protocol.packages import AGENT
from kedge_targets import contract, huge_pages, refusal_remedies
from kedge_targets.calls import plan
from kedge_targets.contract import Array
from kedge_targets.graph import library

if TYPE_CHECKING:
    from kedge_targets.decoder.session import DecoderSession
    from kedge_targets.decoder.stages import Stage

FUSED = "fused"
REFERENCE = "reference"
CPU = "CPUExecutionProvider"

_KNOWN_OPTIONS = frozenset({"threads", "spin"})


class Runtime(contract.Runtime):
    """Runs models on ONNX Runtime's CPU kernels.

    Options:
        threads: number of threads for one call; 0 lets the library choose (one for each physical core).
        spin: whether idle threads wait for the next call by spinning for a moment (the library's default). Measured on
            2 cores, ic_resnet8 int8: 91 us a call with it, 149 us without; a device that must save its battery or has
            other work should set it to false.
    """

    distributions = ("onnxruntime",)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``fused``: the library's own choice, integer kernels. ``reference``: each node by
        itself as ONNX defines it, quantized layers between float operators.

        Measured on ic_resnet8 and kws_dscnn: the fused integer kernels give bit-identical results in 1.20, 1.23, 1.28
        and 1.31, with AVX-512 VNNI and on an emulated Haswell. Another version or processor may fuse less; the
        reference is the extreme case: no fusion at all.
        """
        return (FUSED, REFERENCE)

    def ways(self, options: Mapping[str, Any], cores: int) -> tuple[contract.Way, ...]:
        """See :meth:`kedge_targets.contract.Runtime.ways`: numbers of threads, without and with spinning."""
        return tuple(
            contract.Way(options={"threads": threads, "spin": spin}, calls=cores // threads)
            for threads in plan.numbers_of_threads(cores)
            for spin in ((False, True) if threads > 1 else (False,))
        )

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        return Session(_opened(entry, options, kernel_set))

    def load_decoder(
        self, entry: Path, options: Mapping[str, Any], *, slots: int, context: int, kernel_set: str | None = None
    ) -> DecoderSession:
        """See :meth:`kedge_targets.contract.Runtime.load_decoder`."""
        from kedge_targets.backends.onnxruntime.decoder.exported_session import ExportedDecoderSession, is_exported
        from kedge_targets.backends.onnxruntime.decoder.session import ENCODER, OnnxDecoderSession

        with huge_pages.moving():
            decoder = _opened(entry, options, kernel_set)
        if is_exported(decoder):
            return ExportedDecoderSession(decoder, slots=slots, context=context)
        encoder = None
        if any(one.name.startswith("cross.") for one in decoder.get_inputs()):
            encoder = _opened(entry.with_name(ENCODER), options, kernel_set)
        return OnnxDecoderSession(decoder, slots=slots, context=context, encoder=encoder)

    def load_stage(
        self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None
    ) -> Callable[[int, int], Stage]:
        """See :meth:`kedge_targets.contract.Runtime.load_stage`."""
        from kedge_targets.backends.onnxruntime.decoder.stage import HEAD, OnnxStage

        with huge_pages.moving():
            layers, head = _opened(entry, options, kernel_set), None
        if entry.with_name(HEAD).is_file():
            head = _opened(entry.with_name(HEAD), options, kernel_set)
        turn = threading.Lock()
        return lambda slots, context: OnnxStage(layers, head, turn, slots=slots, context=context)


def _opened(entry: Path, options: Mapping[str, Any], kernel_set: str | None) -> Any:
    onnxruntime = library.load("onnxruntime", of=AGENT)
    settings = _settings(onnxruntime, options, kernel_set or FUSED)
    return opened(onnxruntime, str(entry), settings, where=entry.name)


def opened(
    onnxruntime: Any,
    graph: str | bytes,
    settings: Any,
    *,
    where: str,
    providers: Sequence[str] = (CPU,),
    remedy: str | None = None,
) -> Any:
    """Open a session of ONNX Runtime.

    Args:
        graph: a file's path, or its content.
        where: for errors; so is ``remedy``, by default what helps against the library's reason.
        providers: by preference.

    Raises:
        VerificationError: ONNX Runtime refuses the file.
    """
    try:
        return onnxruntime.InferenceSession(graph, settings, providers=list(providers))
    except Exception as error:  # the library's errors have no common base but Exception
        reason = library.reason_of(error)
        raise VerificationError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the file: {reason}",
            where=where,
            remedy=remedy or refusal_remedies.remedy(reason),
        ) from error


class Session(contract.Session):
    """One loaded model. Several threads may run an ONNX Runtime session at once."""

    concurrent = True

    def __init__(self, session: Any) -> None:
        self._run = session.run
        # Bound once: the bare call builds both lists anew each time.
        self._inputs = [tensor.name for tensor in session.get_inputs()]
        self._outputs = [tensor.name for tensor in session.get_outputs()]
        self._only = self._inputs[0] if len(self._inputs) == 1 else None

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: ONNX Runtime refuses these arrays.
        """
        only = self._only
        try:
            feeds = dict(zip(self._inputs, inputs, strict=True)) if only is None else {only: inputs[0]}
            answer: list[Array] = self._run(self._outputs, feeds)
        except Exception as error:  # the library's errors have no common base but Exception
            raise InputError(f"ONNX Runtime cannot run these arrays: {library.reason_of(error)}") from error
        return answer

    def close(self) -> None:
        """Free the session."""
        self._run = _closed


def _settings(onnxruntime: Any, options: Mapping[str, Any], kernel_set: str) -> Any:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    threads = options.get("threads", 0)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ConfigError(f"threads = {threads!r} is no number of threads", remedy="Give 0 or more")
    settings = onnxruntime.SessionOptions()
    # Nothing is written to the application's terminal: an error is raised besides, and warnings are not its affair.
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    settings.add_session_config_entry("session.intra_op.allow_spinning", _flag(options, "spin", True))
    if kernel_set == REFERENCE:
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    elif kernel_set != FUSED:
        raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {FUSED} and {REFERENCE}")
    return settings


def _flag(options: Mapping[str, Any], name: str, default: bool) -> str:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ConfigError(f"{name} = {value!r} is neither true nor false")
    return "1" if value else "0"


def _closed(*_: object) -> list[Array]:
    raise InputError("the model is closed")
