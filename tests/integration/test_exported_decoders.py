"""A decoder that was exported to ONNX with past and present is taken as it is, or with its weights in codes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from tests.support import exported_decoders

import kedge
from kedge.importing.decoders import exported
from kedge_agent import Model
from kedge_protocol.errors import ConfigError, InputError, ModelError
from kedge_targets import registry
from kedge_targets.proof import ProveRequest, prove

_TOKENS = [1, 17, 40, 41, 9, 77, 80, 12, 5, 66, 31, 30]


def logits(file: Path, tokens: list[int]) -> np.ndarray[Any, Any]:
    """What the file itself computes of all tokens at once."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    empty: Any = np.zeros((1, exported_decoders.HEADS, 0, exported_decoders.SIZE), np.float32)
    feeds = {one.name: empty for one in session.get_inputs() if one.name.startswith("past_")}
    feeds["input_ids"] = np.array([tokens], np.int64)
    feeds["attention_mask"] = np.ones((1, len(tokens)), np.int64)
    feeds["position_ids"] = np.arange(len(tokens))[None]
    found: np.ndarray[Any, Any] = session.run(["logits"], feeds)[0][0]
    return found


def compiled(file: Path, out: str, **options: Any) -> kedge.Release:
    texts = file.parent / "texts.txt"
    random = np.random.default_rng(3)
    texts.write_text("".join(chr(40 + at) for at in random.integers(0, 50, 2500)))
    return kedge.compile(
        file,
        name="taken",
        version="1.0",
        targets=["generic-cpu"],
        calibration=texts,
        evaluation=texts,
        out=file.parent / out,
        **options,
    )


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported_decoders.folder(tmp_path_factory.mktemp("exported"))


def test_chunks_steps_and_copies_compute_what_the_whole_does(file: Path) -> None:
    session = registry.runtime("onnxruntime").load_decoder(file, {"threads": 1}, slots=3, context=32)
    expected = logits(file, _TOKENS)
    parts = [session.extend(1, _TOKENS[:5], keep=5), session.extend(1, _TOKENS[5:8], keep=3)]
    session.copy(1, 0, 8)
    session.extend(2, _TOKENS[:3])
    for token in _TOKENS[8:]:
        found = session.step({0: token, 1: token, 2: token})
        parts.append(found[1][None])
        assert np.allclose(found[0], found[1], atol=1e-5)
    assert np.abs(np.concatenate(parts) - expected).max() / expected.std() < 1e-5
    other = logits(file, [*_TOKENS[:3], *_TOKENS[8:]])[-1]
    assert np.abs(found[2] - other).max() / expected.std() < 1e-5


def test_it_is_compiled_as_it_is_and_written_with(file: Path, tmp_path: Path) -> None:
    release = compiled(file, "out", quantize="precision=float32", slots=2)
    assert release.generation is not None
    figures = release.generation.targets[0].attempt.figures
    assert (figures.kl, figures.agreement) == (0, 1)
    with Model(release.path, target="generic-cpu") as model:
        tokens = model.loaded().generator.tokens("Hello")
        written: list[int] = []
        while len(written) < 12:
            written.append(int(logits(file, [*tokens, *written])[-1].argmax()))
        answers = [model.generate("Hello", stream=True, max_tokens=12, ignore_end=True) for _ in range(2)]
        assert [list(one.finish().tokens) for one in answers] == [written, written]
    bundle = release.bundles["generic-cpu"]
    for title, layer in bundle.files.items():
        (tmp_path / title).write_bytes((release.path / "blobs" / "sha256" / layer.digest[7:]).read_bytes())
    (tmp_path / "config").write_bytes(bundle.config_raw)
    request = ProveRequest(folder=str(tmp_path), config=str(tmp_path / "config"))
    assert prove(request, lambda what, done, total: None).holds


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_its_weights_are_stored_in_codes(precision: str, tmp_path: Path) -> None:
    file = exported_decoders.folder(tmp_path / "model", inner=512, beside=True)
    release = compiled(file, "out", quantize=f"precision={precision}")
    assert release.generation is not None
    entry = release.generation.targets[0]
    assert 0 < entry.attempt.figures.kl < {"int8": 0.01, "int4": 0.4}[precision]
    assert entry.bytes < {"int8": 0.5, "int4": 0.4}[precision] * release.generation.source_bytes


def test_weights_that_are_codes_already_stay_as_they_are(tmp_path: Path) -> None:
    file = exported_decoders.folder(tmp_path / "model", inner=512)
    first = compiled(file, "out", quantize="precision=int8")
    stored = {title: layer.digest[7:] for title, layer in first.bundles["generic-cpu"].files.items()}
    coded = file.parent / "coded"
    coded.mkdir()
    for title in ("decoder.onnx", "decoder.bin"):
        (coded / title).write_bytes((first.path / "blobs" / "sha256" / stored[title]).read_bytes())
    for title in ("tokenizer.json", "config.json"):
        (coded / title).write_bytes(file.with_name(title).read_bytes())
    release = compiled(coded / "decoder.onnx", "out")
    assert release.generation is not None
    assert "its weights stay as they are" in release.generation.warnings[0]
    assert release.generation.targets[0].attempt.label == "as it is"


def test_files_that_cannot_be_taken_are_errors_that_say_why(file: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "model.onnx").write_bytes(file.read_bytes())
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        exported.read(alone / "model.onnx")
    model = onnx.load(str(file))
    model.graph.input.append(onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))
    onnx.save(model, str(file.with_name("merged.onnx")))
    with pytest.raises(ModelError, match="the input 'use_cache_branch' is not known"):
        exported.read(file.with_name("merged.onnx"))
    other = onnx.load(str(file))
    for one in other.graph.input:
        if one.name.startswith("past_"):
            one.type.tensor_type.elem_type = onnx.TensorProto.BFLOAT16
    onnx.save(other, str(file.with_name("bfloat16.onnx")))
    with pytest.raises(ModelError, match="the past is BFLOAT16"):
        exported.read(file.with_name("bfloat16.onnx"))
    file.with_name("cut.onnx").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is no ONNX file"):
        exported.read(file.with_name("cut.onnx"))
    beside = exported_decoders.folder(tmp_path / "beside", beside=True)
    beside.with_name("model.onnx_data").unlink()
    with pytest.raises(ModelError, match=r"'model\.onnx_data' beside it is missing"):
        exported.read(beside)
    for quantize, text in (("method=gptq", "gptq"), ("precision=float16", "float16"), ("embedding=int8", "embedding")):
        with pytest.raises(ConfigError, match=text):
            compiled(file, "no", quantize=quantize)
    with pytest.raises(ConfigError, match="--step"):
        compiled(file, "no", step=("prune-width",))
    with pytest.raises(InputError, match="adapter"):
        compiled(file, "no", adapter=tmp_path)
