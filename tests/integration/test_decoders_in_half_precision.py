"""A decoder's graph for ONNX Runtime's CUDA provider computes in float16 what the decoder computes. No GPU is needed:
here the same graph runs on the processor, with caches in tensors of ONNX Runtime's own, as a device's are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.integration.test_decoder_graphs import session_of
from tests.support import decoders
from tests.support.compiling import unpacked

import kedge
from kedge.compiler.release import Release
from kedge.importing.decoders import reading
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.bundle.config import Verified
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import LoweringError
from kedge_targets import proof, registry
from kedge_targets.backends.onnxruntime.decoder.session import OnnxDecoderSession
from kedge_targets.backends.tensorrt.decoder import single_precision
from kedge_targets.backends.tensorrt.decoder.device_caches import DeviceCaches
from kedge_targets.graph import library

_BACKEND = "tensorrt"
_TOKENS = [3, 17, 40, 41, 9, 77, 80, 12, 5, 66, 31, 30, 29, 8]
HALF = Scheme(precision="float16", embedding="float16")


class _HostCaches(DeviceCaches):
    device = "cpu"


def _of_entry(entry: Path, *, slots: int) -> OnnxDecoderSession:
    """Open a graph on the processor, with caches as a device has them."""
    session = library.load().InferenceSession(str(entry), providers=["CPUExecutionProvider"])
    return OnnxDecoderSession(session, slots=slots, context=32, caches=_HostCaches)


@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_logits_are_those_of_a_float64_decoder_up_to_half_precision(name: str, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", name))
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    session_of(decoder, tmp_path / "made", HALF, backend=_BACKEND).close()
    graph = onnx.load(str(tmp_path / "made" / "decoder.onnx"), load_external_data=False).graph
    half = onnx.TensorProto.FLOAT16
    assert {one.type.tensor_type.elem_type for one in graph.input if one.name.startswith("past.")} == {half}
    assert onnx.TensorProto.FLOAT not in {one.data_type for one in graph.initializer}
    session = _of_entry(tmp_path / "made" / "decoder.onnx", slots=3)
    # A chunk, a beginning that another slot takes over, and single steps of slots with unlike lengths.
    parts = [session.extend(1, _TOKENS[:7], keep=7), session.extend(1, _TOKENS[7:10], keep=3)]
    session.copy(1, 2, 10)
    session.extend(0, _TOKENS[:3])
    session.truncate(1, 0)
    parts += [session.step({0: 5, 2: token})[2][None] for token in _TOKENS[10:]]
    error = np.abs(np.concatenate(parts) - expected).max() / expected.std()
    assert 1e-6 < error < 0.02
    session.close()


@pytest.mark.parametrize("scheme", [HALF, Scheme(precision="int8", method="plain"), Scheme(method="plain")])
def test_what_computes_in_float32_from_the_same_file_is_near_and_not_the_same(scheme: Scheme, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama"))
    session_of(decoder, tmp_path / "made", replace(scheme, group=16), backend=_BACKEND).close()
    runtime, entry = registry.runtime(_BACKEND), tmp_path / "made" / "decoder.onnx"
    found = {}
    for kernel_set in ("fp16", "coarse"):
        session = runtime.load_decoder(entry, {"threads": 1}, slots=1, context=32, kernel_set=kernel_set)
        found[kernel_set] = session.extend(0, _TOKENS, keep=len(_TOKENS))
        session.close()
    apart = np.abs(found["fp16"] - found["coarse"]).max() / found["coarse"].std()
    assert 1e-6 < apart < 0.02
    single = onnx.load_model_from_string(single_precision.of(entry)).graph
    assert onnx.TensorProto.FLOAT16 not in {one.type.tensor_type.elem_type for one in (*single.input, *single.output)}


def _compiled(tmp_path: Path, target: str, **options: Any) -> Release:
    decoders.folder(tmp_path / "model", "llama")
    text = tmp_path / "text.txt"
    text.write_text("HELLO WORLD " * 200)
    return kedge.compile(
        tmp_path / "model", name="writer", version="1.0", targets=[target], out=tmp_path / "out",
        calibration=text, evaluation=text, **options,
    )  # fmt: skip


def _proved(folder: Path) -> proof.ProveAnswer:
    request = proof.ProveRequest(folder=str(folder), config=str(folder / "config.json"))
    return proof.prove(request, lambda what, done, total: None)


@pytest.mark.parametrize("target", ["jetson-orin-nano", "nvidia-gpu"])
def test_a_gpu_gets_a_language_model_that_is_checked_here_and_proves_itself(target: str, tmp_path: Path) -> None:
    release = _compiled(tmp_path, target, max_kl=0.5)
    config = Layout(release.path).bundle(target).config
    assert (config.backend, config.verified) == (_BACKEND, Verified.CHECKED)
    assert {one.distribution for one in config.runtimes} == {"onnxruntime-gpu", "onnxruntime"}
    assert config.generation is not None
    assert config.generation.position_bytes == 3 * 2 * 2 * 16 * 2  # layers, keys and values, heads, channels, bytes
    folder = unpacked(release, target, tmp_path / "slot")
    answer = _proved(folder)
    assert answer.holds
    assert "on the CPU, as it finds no CUDA" in answer.detail
    # One lost matrix is far outside of what the tolerances leave to a GPU's rounding.
    model = onnx.load(str(folder / "decoder.onnx"), load_external_data=False)
    lost = next(one for one in model.graph.initializer if one.name.startswith("1.o."))
    content = bytearray((folder / "decoder.bin").read_bytes())
    place = {one.key: one.value for one in lost.external_data}
    start, length = int(place["offset"]), int(place["length"])
    content[start : start + length] = bytes([0x88]) * length  # codes of 4 bits that say 0
    (folder / "decoder.bin").write_bytes(content)
    assert not _proved(folder).holds


@pytest.mark.parametrize(
    ("options", "why"),
    [({"quantize": "precision=float32"}, "compute in float16 on CUDA"), ({"cache": "int8"}, "stored in float16")],
)
def test_what_cuda_does_not_have_is_refused_before_the_work(options: dict[str, str], why: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=why) as refused:
        _compiled(tmp_path, "nvidia-gpu", **options)
    assert "compile for a CPU" in str(refused.value.remedy)
