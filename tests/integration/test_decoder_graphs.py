"""A decoder's graph on ONNX Runtime computes what the decoder computes, by one step and by many."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support import decoders

from kedge.evaluation.decoders import reference as references
from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_layers import LayerSource, QuantizedLayers, table
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.errors import InputError
from kedge_targets import registry
from kedge_targets.decoder.contract import Ends
from kedge_targets.decoder.session import DecoderSession

_BACKEND = "onnxruntime"
_TOKENS = [3, 17, 40, 41, 9, 77, 80, 12, 5, 66, 31, 30, 29, 8]
FLOAT = Scheme(precision="float32", embedding="float32")


def session_of(
    decoder: Decoder,
    workdir: Path,
    scheme: Scheme = FLOAT,
    *,
    slots: int = 1,
    context: int = 32,
    calibration: list[list[int]] | None = None,
    backend: str = _BACKEND,
    stored: bool = True,
) -> DecoderSession:
    """Compile and open a decoder; with ``stored`` False its caches stay float whatever the scheme says."""
    compiler = registry.compiler(backend).decoders()
    assert compiler is not None
    weights, spec = decoder.weights, decoder.spec
    names = ["norm", *(["norm.bias"] if weights.has_bias("norm") else [])]
    ends = Ends(
        embedding=table(weights.outer("embedding"), scheme),
        positions=weights.outer("positions") if spec.learned_positions else None,
        norm={name: weights.outer(name) for name in names},
        head=None if spec.tied else table(weights.outer("head"), scheme),
    )
    workdir.mkdir(exist_ok=True)
    learned = references.embedded(spec, weights.outer("embedding"), ends.positions, calibration or [])
    layers = QuantizedLayers(LayerSource(spec, weights, compiler, context), scheme, learned, lambda done, total: None)
    pieces = layers if stored else lambda index: replace(layers(index), cache=None)
    lowered = compiler.lower(spec, ends, pieces, context=context, workdir=workdir)
    return registry.runtime(backend).load_decoder(workdir / lowered.entry, {"threads": 1}, slots=slots, context=context)


@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_logits_are_those_of_a_float64_decoder_in_prefill_chunk_and_decode(name: str, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", name))
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    session = session_of(decoder, tmp_path / "made", slots=2)
    parts = [session.extend(1, _TOKENS[:7], keep=7), session.extend(1, _TOKENS[7:10], keep=3)]
    parts += [session.step({1: token})[1][None] for token in _TOKENS[10:]]
    found = np.concatenate(parts)
    assert np.abs(found - expected).max() / expected.std() < 1e-5


@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_keys_and_values_in_int8_say_nearly_the_same_in_a_quarter_of_the_bytes(name: str, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", name))
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    random = np.random.default_rng(5)
    # Every token at many places: what calibration never met is clipped.
    calibration = [random.integers(1, decoders.VOCABULARY, 24).tolist() for _ in range(60)]
    whole = session_of(decoder, tmp_path / "float", slots=2)
    session = session_of(decoder, tmp_path / "int8", replace(FLOAT, cache="int8"), slots=2, calibration=calibration)
    parts = [session.extend(1, _TOKENS[:7], keep=7), session.extend(1, _TOKENS[7:10], keep=3)]
    session.copy(1, 0, 10)
    parts += [session.step({0: token, 1: token})[0][None] for token in _TOKENS[10:]]
    error = np.concatenate(parts) - expected
    assert 0 < np.sqrt((error**2).mean()) / expected.std() < 0.02
    assert session.cache_bytes * 4 == whole.cache_bytes


@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_layers_that_are_made_for_int8_compute_the_same_in_float(name: str, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", name))
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    calibration = [[token] * 8 for token in range(3, 40)]
    session = session_of(
        decoder, tmp_path / "made", replace(FLOAT, cache="int8"), calibration=calibration, stored=False
    )
    found = session.extend(0, _TOKENS, keep=len(_TOKENS))
    assert np.abs(found - expected).max() / expected.std() < 2e-5


def test_the_values_of_a_first_token_that_all_look_at_are_nearly_exact_in_int8(tmp_path: Path) -> None:
    """Its values are small, and a scale that fits the others is coarse for them."""
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama"))
    compiler = registry.compiler(_BACKEND).decoders()
    assert compiler is not None
    calibration = [[3, token, token + 1, token + 2] for token in range(4, 60)]
    embedding = decoder.weights.outer("embedding")
    embedded = references.embedded(decoder.spec, embedding, None, calibration)
    source = LayerSource(decoder.spec, decoder.weights, compiler, 32)
    made = QuantizedLayers(source, replace(FLOAT, cache="int8"), embedded, lambda done, total: None)(0)
    _, values = source.runner(0, made).cached(embedded[0])
    assert np.abs(values[:, 0]).max() < 1e-5
    assert np.abs(values[:, 1:]).max() > 1e-2


def test_keys_in_int8_fit_at_positions_that_calibration_never_reached(tmp_path: Path) -> None:
    """Rotation moves a pair's length from one channel to the other: scales of single channels would clip it."""
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama"))
    random = np.random.default_rng(6)
    tokens = random.integers(3, decoders.VOCABULARY, 60).tolist()
    calibration = [[token] * 2 for token in range(3, decoders.VOCABULARY)]
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(tokens)
    scheme = replace(FLOAT, cache="int8")
    session = session_of(decoder, tmp_path / "int8", scheme, context=64, calibration=calibration)
    error = session.extend(0, tokens, keep=60) - expected
    assert np.sqrt((error[20:] ** 2).mean()) / expected.std() < 0.03


def test_sequences_of_unlike_length_are_decoded_together_as_alone(tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", "mistral"))
    session = session_of(decoder, tmp_path / "made", slots=3)
    alone = decoders.PlainDecoder(decoder.spec, decoder.weights)
    session.extend(0, _TOKENS[:9])
    session.extend(1, [7] * 20)
    session.extend(2, _TOKENS[4:8])
    found = session.step({0: 5, 2: 6})
    for slot, tokens in ((0, [*_TOKENS[:9], 5]), (2, [*_TOKENS[4:8], 6])):
        expected = alone.logits(tokens)[-1]
        assert np.abs(found[slot] - expected).max() / expected.std() < 1e-5
    assert session.lengths.tolist() == [10, 20, 5]


def test_a_copied_prefix_goes_on_bit_for_bit_as_the_whole_prompt(tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama3"))
    session = session_of(decoder, tmp_path / "made", slots=2)
    session.extend(0, _TOKENS[:8])
    whole = session.extend(0, _TOKENS[8:])
    session.copy(0, 1, 8)
    assert np.array_equal(session.extend(1, _TOKENS[8:]), whole)


@pytest.mark.parametrize("scheme", ["int8", "int4", "float16"])
def test_stored_codes_compute_what_they_stand_for(scheme: str, tmp_path: Path) -> None:
    decoder = reading.read(decoders.folder(tmp_path / "model", "llama3"))
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(_TOKENS)
    embedding = "float16" if scheme == "float16" else "int8"
    session = session_of(
        decoder, tmp_path / "made", Scheme(precision=scheme, method="plain", group=16, embedding=embedding)
    )
    error = np.abs(session.extend(0, _TOKENS, keep=len(_TOKENS)) - expected).mean() / expected.std()
    assert error < {"int8": 0.05, "int4": 0.5, "float16": 0.002}[scheme]
    assert error > 0


def test_a_step_beyond_the_context_is_an_error_before_it_is_run(tmp_path: Path) -> None:
    session = session_of(reading.read(decoders.folder(tmp_path / "model", "llama3")), tmp_path / "made")
    session.extend(0, [5] * 31)
    session.step({0: 5})
    with pytest.raises(InputError, match="33 positions are needed, the context has 32"):
        session.step({0: 5})


@pytest.mark.parametrize("form", ["BF16 in shards", "F16"])
def test_shards_and_halves_are_read_as_the_numbers_they_are(form: str, tmp_path: Path) -> None:
    whole = reading.read(decoders.folder(tmp_path / "whole", "qwen2"))
    dtype, shards = form.split()[0], 3 if "shards" in form else 1
    other = reading.read(decoders.folder(tmp_path / "other", "qwen2", dtype=dtype, shards=shards))
    for name, tensor in whole.weights.layer(1).items():
        assert np.allclose(other.weights.layer(1)[name], tensor, rtol=2**-7, atol=1e-6)
