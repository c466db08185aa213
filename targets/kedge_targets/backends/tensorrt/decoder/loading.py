"""Opens decoders with ONNX Runtime on an NVIDIA GPU, else on the processor."""

from __future__ import annotations

from pathlib import Path

from kedge_protocol.packages import AGENT
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
    session, on_gpu = fallback.opened(onnxruntime, graph, settings, where=entry.name)
    decoder = OnnxDecoderSession(session, slots=slots, context=context, caches=DeviceCaches if on_gpu else SlotCaches)
    where = "on CUDA" if on_gpu else "on the CPU, as it finds no CUDA"
    decoder.detail = f"ONNX Runtime {onnxruntime.__version__} {where}"
    return decoder
