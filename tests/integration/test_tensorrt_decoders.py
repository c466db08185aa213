"""What NVIDIA's own parser and builder take of a decoder whose past is an input and whose present is an output. No GPU
is needed; no decoder is written for TensorRT yet, and this is what one will have to look like."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import past_decoders
from tests.support.past_decoders import CONTEXT, KV_HEADS, LAYERS, SIZE, PastDecoder

import kedge
from kedge.compiler.decoders import plans
from kedge_protocol.errors import TargetError
from kedge_targets import target as targets
from kedge_targets.backends.tensorrt import parser_check
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.decoder.contract import DECODERS
from kedge_targets.target import DEVICES

_STEP = 32


def checked(model: PastDecoder, folder: Path) -> parser_check.Checked:
    """What the toolchain says of a graph, with an empty past among the shapes."""
    path = folder / "decoder.onnx"
    path.write_bytes(model.model().SerializeToString())
    ids = [
        InputProfile(name=name, minimum=(1, 1), optimum=(1, 1), maximum=(1, _STEP))
        for name in ("input_ids", "position_ids")
    ]
    mask = InputProfile(name="mask", minimum=(1, 1, 1, 1), optimum=(1, 1, 1, 17), maximum=(1, 1, _STEP, CONTEXT))
    past = [
        InputProfile(
            name=f"past_key_values.{layer}.{part}",
            minimum=(1, KV_HEADS, 0, SIZE),
            optimum=(1, KV_HEADS, 16, SIZE),
            maximum=(1, KV_HEADS, CONTEXT - _STEP, SIZE),
        )
        for layer in range(LAYERS)
        for part in ("key", "value")
    ]
    profiles = (*ids, mask, *past)
    return parser_check.check(path, workspace_bytes=1 << 28, profiles=profiles, capabilities=("SM86",))


@pytest.mark.usefixtures("tensorrt_toolchain")
@pytest.mark.parametrize("coded", [False, True])
def test_attention_in_plain_operators_with_an_explicit_past_is_built_weights_of_4_bits_too(
    coded: bool, tmp_path: Path
) -> None:
    found = checked(PastDecoder(coded=coded), tmp_path)
    assert found.accepted, found.errors
    assert found.engine_bytes > 0


@pytest.mark.usefixtures("tensorrt_toolchain")
def test_the_operator_attention_with_past_and_present_is_refused(tmp_path: Path) -> None:
    found = checked(PastDecoder("Attention"), tmp_path)
    assert not found.accepted
    assert found.errors[0].operator == "Attention"
    assert "one output" in found.errors[0].what


_WHY = {
    "tflite-board": "TensorFlow Lite keeps no cache of keys and values",
    "ncs2": "blobs of fixed shapes",
    "pynq-z2": "a language model does not fit",
    "intel-npu": "on its CPU alone, not on NPU",
}


@pytest.mark.parametrize("target", list(_WHY))
def test_a_target_that_takes_no_decoder_says_why_and_what_to_use_instead(target: str, tmp_path: Path) -> None:
    from tests.support import decoders

    decoders.folder(tmp_path / "model", "llama")
    (tmp_path / "text.txt").write_text("HELLO" * 100)
    if target == "tflite-board":
        known = (DEVICES / "rpi4.toml").read_text().split('[[backends]]\nname = "onnxruntime"')[0]
        (tmp_path / "board.toml").write_text(known)
        target, why = str(tmp_path / "board.toml"), _WHY[target]
    else:
        why = _WHY[target]
    with pytest.raises(TargetError, match=why) as refused:
        kedge.compile(
            tmp_path / "model", name="writer", version="1.0", targets=[target], out=tmp_path / "out",
            calibration=tmp_path / "text.txt", evaluation=tmp_path / "text.txt",
        )  # fmt: skip
    assert "generic-arm" in str(refused.value.remedy)
    assert not (tmp_path / "out").exists()


def test_a_raspberry_pi_4_runs_decoders_by_the_backend_that_is_not_its_usual_one() -> None:
    (choice,) = plans.routes(targets.find("rpi4"), DECODERS, None)
    assert choice.name == "onnxruntime"


def test_the_small_decoder_has_a_cache_as_decoders_have_it() -> None:
    names = [one.name for one in PastDecoder().model().graph.output]
    assert names == [
        "logits",
        *(f"present.{at}.{part}" for at in range(past_decoders.LAYERS) for part in ("key", "value")),
    ]
