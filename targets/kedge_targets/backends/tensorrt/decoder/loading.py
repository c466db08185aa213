"""Opens decoders with ONNX Runtime on an NVIDIA GPU, else on the processor."""

from __future__ import annotations

from pathlib import Path

from kedge_protocol.errors import VerificationError
from kedge_protocol.packages import AGENT
from kedge_targets import refusal_remedies
from kedge_targets.backends.onnxruntime.decoder.session import OnnxDecoderSession
from kedge_targets.backends.onnxruntime.decoder.slot_caches import SlotCaches
from kedge_targets.backends.tensorrt import fallback
from kedge_targets.backends.tensorrt.decoder import single_precision
from kedge_targets.backends.tensorrt.decoder.device_caches import DeviceCaches
from kedge_targets.decoder.session import DecoderSession
from kedge_targets.graph import library


def opened(entry: Path, *, threads: int, slots: int, context: int, single: bool = False) -> DecoderSession:
    """Open a decoder's file, with caches in the GPU's memory if the GPU runs it.

    Args:
        threads: number of threads of one step on the processor; 0 lets the library choose.
        single: whether it computes in float32, see :mod:`.single_precision`.

    Raises:
        MissingDependencyError: ONNX Runtime is missing.
        VerificationError: it refuses the file.
        InputError: the caches do not fit into memory.
    """
    onnxruntime = library.load(fallback.DISTRIBUTIONS[-1], of=AGENT)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = threads
    graph: bytes | str = str(entry)
    if single:
        graph = single_precision.of(entry)
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(entry.parent))
    providers = [one for one in (fallback.CUDA, fallback.CPU) if one in onnxruntime.get_available_providers()]
    try:
        session = onnxruntime.InferenceSession(graph, settings, providers=providers)
    except Exception as error:  # the library's errors have no common base but Exception
        raise VerificationError(
            f"ONNX Runtime {onnxruntime.__version__} refuses the file: {library.reason_of(error)}",
            where=entry.name,
            remedy=refusal_remedies.remedy(library.reason_of(error)),
        ) from error
    # Where CUDA's libraries do not load, ONNX Runtime takes the processor without an error: ask what it took.
    on_gpu = fallback.CUDA in session.get_providers()
    decoder = OnnxDecoderSession(session, slots=slots, context=context, caches=DeviceCaches if on_gpu else SlotCaches)
    where = "on CUDA" if on_gpu else "on the CPU, as it finds no CUDA"
    decoder.detail = f"ONNX Runtime {onnxruntime.__version__} {where}"
    return decoder
