"""A decoder as OpenVINO's stateful model computes what the decoder computes, and shares codes with ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.test_decoder_graphs import _TOKENS, FLOAT, session_of
from tests.support import decoders

import kedge
from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_layers import LayerSource, QuantizedLayers, table
from kedge.quantization.decoder_scheme import Scheme
from kedge.quantization.kept_pieces import KeptPieces
from kedge_agent import Model
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import ConfigError, InputError, TargetError
from kedge_targets import registry
from kedge_targets.decoder.contract import DECODERS, EXPORTED
from kedge_targets.decoder.matrix import Codes, real

_BACKEND = "openvino"


def read(tmp_path: Path, name: str) -> Decoder:
    return reading.read(decoders.folder(tmp_path / "model", name))


@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_logits_are_those_of_a_float64_decoder_in_prefill_chunk_decode_and_after_a_cut(
    name: str, tmp_path: Path
) -> None:
    decoder = read(tmp_path, name)
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    session = session_of(decoder, tmp_path / "made", slots=2, backend=_BACKEND)
    parts = [session.extend(1, _TOKENS[:7], keep=7), session.extend(1, _TOKENS[7:10], keep=3)]
    parts += [session.step({1: token})[1][None] for token in _TOKENS[10:]]
    assert np.abs(np.concatenate(parts) - expected).max() / expected.std() < 1e-5
    session.truncate(1, 5)
    again = session.extend(1, _TOKENS[5:], keep=len(_TOKENS) - 5)
    assert np.abs(again - expected[5:]).max() / expected.std() < 1e-5
    session.copy(1, 0, 6)
    assert np.abs(session.extend(0, _TOKENS[6:], keep=8) - again[1:]).max() / expected.std() < 1e-5


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_wrong_guesses_again_and_again_change_nothing(name: str, tmp_path: Path) -> None:
    """Without windows they are masked until they are many; with windows they are cut off."""
    decoder = read(tmp_path, name)
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    session = session_of(decoder, tmp_path / "made", slots=2, context=48, backend=_BACKEND)
    session.extend(0, _TOKENS[:4])
    for at in range(4, len(_TOKENS)):
        session.extend(0, [90] * 20)
        session.truncate(0, at)
        found = session.step({0: _TOKENS[at]})[0]
        assert np.abs(found - expected[at]).max() / expected.std() < 1e-5
    session.extend(0, [90] * 3)
    session.copy(0, 1, 10)
    assert np.abs(session.extend(1, _TOKENS[10:], keep=4) - expected[10:]).max() / expected.std() < 1e-5


def test_slots_of_unlike_length_are_decoded_as_alone_and_one_that_is_emptied_begins_anew(tmp_path: Path) -> None:
    decoder = read(tmp_path, "mistral")
    session = session_of(decoder, tmp_path / "made", slots=3, backend=_BACKEND)
    alone = decoders.PlainDecoder(decoder.spec, decoder.weights)
    session.extend(0, _TOKENS[:9])
    session.extend(1, [7] * 20)
    session.extend(2, _TOKENS[4:8])
    found = session.step({0: 5, 2: 6})
    for slot, tokens in ((0, [*_TOKENS[:9], 5]), (2, [*_TOKENS[4:8], 6])):
        expected = alone.logits(tokens)[-1]
        assert np.abs(found[slot] - expected).max() / expected.std() < 1e-5
    assert session.lengths.tolist() == [10, 20, 5]
    session.truncate(1, 0)
    expected = alone.logits(_TOKENS)[-1]
    assert np.abs(session.extend(1, _TOKENS)[0] - expected).max() / expected.std() < 1e-5


@pytest.mark.parametrize("scheme", ["int8", "int4", "float16"])
@pytest.mark.parametrize("group", [16, 32])
def test_codes_scales_and_zero_points_compute_exactly_what_they_stand_for(
    scheme: str, group: int, tmp_path: Path
) -> None:
    # The feed-forward network has 48 channels: one group and a half of 32.
    decoder = read(tmp_path, "llama3")
    how = Scheme(precision=scheme, method="plain", group=group, embedding="int8" if scheme != "float16" else scheme)
    session = session_of(decoder, tmp_path / "made", how, backend=_BACKEND)
    found = session.extend(0, _TOKENS, keep=len(_TOKENS))
    expected = decoders.PlainDecoder(decoder.spec, _Stored(decoder, how)).logits(_TOKENS)
    assert np.abs(found - expected).max() / expected.std() < 1e-5


class _Stored:
    """The numbers that a scheme stores, as a decoder's weights."""

    def __init__(self, decoder: Decoder, scheme: Scheme) -> None:
        compiler = registry.compiler(_BACKEND).decoders()
        assert compiler is not None
        self._weights, self._scheme = decoder.weights, scheme
        self._layers = QuantizedLayers(
            LayerSource(decoder.spec, decoder.weights, compiler, 32), scheme, [], lambda done, total: None
        )

    def outer(self, name: str) -> np.ndarray:
        found = self._weights.outer(name)
        return found if found.ndim == 1 else real(table(found, self._scheme))

    def layer(self, index: int) -> dict[str, np.ndarray]:
        piece = self._layers(index)
        heads = {name: real(matrix) for name, matrix in piece.matrices.items()}
        # Heads of 8 channels are stored as 16, of which each second half of a half is 0.
        places = [*range(4), *range(8, 12)]
        for name, count in (("q", 4), ("k", 2), ("v", 2)):
            heads[name] = heads[name].reshape(count, 16, -1)[:, places].reshape(count * 8, -1)
        heads["o"] = heads["o"].reshape(-1, 4, 16)[:, :, places].reshape(-1, 32)
        return {**piece.vectors, **heads}


def test_keys_and_values_in_int8_say_nearly_the_same(tmp_path: Path) -> None:
    decoder = read(tmp_path, "llama")
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    calibration = [[token] * 4 for token in range(3, 40)]
    whole = session_of(decoder, tmp_path / "float", backend=_BACKEND)
    scheme = replace(FLOAT, cache="int8")
    session = session_of(decoder, tmp_path / "int8", scheme, calibration=calibration, backend=_BACKEND)
    session.extend(0, _TOKENS[:7])
    # The first step attends to the numbers as they were before they were stored.
    error = np.stack([session.step({0: token})[0] for token in _TOKENS[7:]]) - expected[7:]
    assert 1e-5 < np.sqrt((error**2).mean()) / expected.std() < 0.02
    assert session.cache_bytes * 4 == whole.cache_bytes


def test_equal_decoders_make_equal_files(tmp_path: Path) -> None:
    decoder = read(tmp_path, "qwen3")
    files = []
    for name in ("one", "other"):
        session_of(decoder, tmp_path / name, Scheme(method="plain"), backend=_BACKEND)
        files.append([path.read_bytes() for path in sorted((tmp_path / name).iterdir())])
    assert files[0] == files[1]


def test_a_step_beyond_the_context_is_an_error_before_it_is_run(tmp_path: Path) -> None:
    session = session_of(read(tmp_path, "llama3"), tmp_path / "made", backend=_BACKEND)
    session.extend(0, [5] * 31)
    session.step({0: 5})
    with pytest.raises(InputError, match="33 positions are needed, the context has 32"):
        session.step({0: 5})


@pytest.mark.parametrize("precision", ["int4", "int8", "float16"])
def test_layers_that_were_learned_come_back_from_disk_as_they_were(precision: str, tmp_path: Path) -> None:
    compiler = registry.compiler(_BACKEND).decoders()
    assert compiler is not None
    decoder = read(tmp_path, "qwen2")
    scheme = Scheme(precision=precision, group=32)
    random = np.random.default_rng(0)
    learned = [random.normal(size=(20, decoder.spec.hidden)).astype(np.float32)]
    source = LayerSource(decoder.spec, decoder.weights, compiler, 32)
    kept = KeptPieces(QuantizedLayers(source, scheme, learned, lambda done, total: None), tmp_path / "kept")
    for index in range(len(decoder.spec.layers)):
        made, again = kept(index), kept.again(index)
        assert made.matrices.keys() == again.matrices.keys()
        assert made.vectors.keys() == again.vectors.keys()
        for name, matrix in made.matrices.items():
            other = again.matrices[name]
            assert isinstance(matrix, Codes) is isinstance(other, Codes) is (precision != "float16")
            assert np.array_equal(real(matrix), real(other))
        assert all(np.array_equal(made.vectors[name], again.vectors[name]) for name in made.vectors)


def test_other_devices_and_other_kinds_of_models_are_refused_in_words() -> None:
    compiler = registry.compiler(_BACKEND).decoders()
    assert compiler is not None
    assert compiler.objection(DECODERS, {"device": "CPU"}) == ""
    assert "not on GPU" in compiler.objection(DECODERS, {"device": "GPU"})
    assert "no exported decoders" in compiler.objection(EXPORTED, {"device": "CPU"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and texts of the tokens that it knows."""
    path = tmp_path_factory.mktemp("intel")
    sizes = {"max_position_embeddings": 128, "vocab_size": 100}
    decoders.folder(path / "model", "llama", changed=sizes)
    random = np.random.default_rng(3)
    for name in ("calibration", "evaluation"):
        (path / f"{name}.txt").write_text("".join(chr(40 + at) for at in random.integers(0, 50, 1500)))
    return path


def compiled(place: Path, out: str, **options: Any) -> kedge.Release:
    return kedge.compile(
        place / "model", name="writer", version="1.0", out=place / out, calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt", **{"targets": ["intel-cpu"], "max_perplexity": "9x", **options},
    )  # fmt: skip


def test_the_faster_backend_is_packed_the_report_says_so_and_the_recipe_keeps_it(place: Path) -> None:
    release = compiled(place, "chosen", quantize="precision=int4,embedding=int8", slots=2)
    assert release.generation is not None
    entry = release.generation.targets[0]
    assert {pace.backend for pace in entry.paces} == {"openvino", "onnxruntime"}
    best = min(entry.paces, key=lambda pace: pace.ratio)
    assert entry.backend == best.backend
    assert all(pace.written_per_second > 0 and not pace.refused for pace in entry.paces)
    # The same codes: what is left is the rounding of activations.
    first, second = (attempt.figures for attempt in entry.attempts)
    assert first.perplexity == pytest.approx(second.perplexity, rel=0.01)
    text = (release.path / "recipe.toml").read_text()
    assert f'backend = "{best.backend}"' in text
    other = "openvino" if best.backend == "onnxruntime" else "onnxruntime"
    recipe = place / "other.toml"
    recipe.write_text(text.replace(f'"{best.backend}"', f'"{other}"'))
    followed = compiled(place, "followed", recipe=recipe, slots=2)
    assert followed.generation is not None
    assert followed.generation.targets[0].backend == other
    assert followed.generation.targets[0].paces == ()
    assert followed.generation.targets[0].attempt.scheme == entry.attempt.scheme
    texts = []
    for path in (release.path, followed.path):
        with Model(path, target="intel-cpu") as model:
            texts.append(model.generate("HELLO", max_tokens=12).text)
    assert texts[0] == texts[1]


def test_targets_share_the_layers_that_were_learned(place: Path) -> None:
    heard: set[tuple[str, str]] = set()
    release = compiled(
        place,
        "shared",
        targets=["generic-cpu", "generic-arm"],
        max_kl=3e-4,
        max_perplexity=None,
        progress=lambda who, what, *_: heard.add((who, what)),
    )
    assert release.generation is not None
    first, second = release.generation.targets
    tried = [attempt.scheme for attempt in first.attempts]
    # Some layers get more bits by what the first target learned of them.
    assert any(scheme.int8_layers and scheme.precision == "int4" for scheme in tried)
    assert [attempt.scheme for attempt in second.attempts] == tried
    learned = [scheme.label for scheme in tried if scheme.calibrated]
    assert {(first.target, label) for label in learned} & heard
    assert not {(second.target, label) for label in learned} & heard
    layout = Layout(release.path)
    weights = [
        {title: one.digest for title, one in layout.bundle(target).files.items() if title.endswith(".onnx")}
        for target in ("generic-cpu", "generic-arm")
    ]
    assert weights[0] == weights[1] != {}


def test_a_recipe_that_does_not_fit_is_an_error_before_the_work(place: Path) -> None:
    recipe = place / "wrong.toml"
    recipe.write_text('schema = 1\n[target.intel-cpu]\nbackend = "tflite"\n[target.intel-cpu.quantize]\n')
    with pytest.raises(ConfigError, match="'tflite' is no backend of intel-cpu"):
        compiled(place, "wrong", recipe=recipe)
    recipe.write_text("schema = 1\n[target.rpi5.quantize]\n")
    with pytest.raises(ConfigError, match="says nothing about intel-cpu"):
        compiled(place, "wrong", recipe=recipe)
    with pytest.raises(ConfigError, match="excludes --recipe"):
        compiled(place, "wrong", recipe=recipe, quantize="precision=int8")
    recipe.write_text('schema = 1\n[target.intel-cpu.quantize]\nprecision = "int5"\n')
    with pytest.raises(ConfigError, match="'int5' is not known"):
        compiled(place, "wrong", recipe=recipe)


def test_a_gpu_of_intel_is_refused_with_what_to_use_instead(place: Path) -> None:
    with pytest.raises(TargetError, match="on its CPU alone, not on GPU") as refused:
        kedge.compile(
            place / "model", name="writer", version="1.0", targets=["intel-igpu"], out=place / "gpu",
            calibration=place / "calibration.txt", evaluation=place / "evaluation.txt",
        )  # fmt: skip
    assert "intel-cpu" in str(refused.value.remedy)
