"""An encoder-decoder's graphs on ONNX Runtime compute what it computes: whatever was read, by one step and by many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import encoder_decoders

from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization import encoder_decoder
from kedge.quantization.decoder_scheme import Scheme
from kedge_protocol.errors import InputError, ModelError
from kedge_targets import registry
from kedge_targets.decoder.session import DecoderSession

_BACKEND = "onnxruntime"
_TOKENS = [0, 17, 40, 41, 9, 77, 80, 12, 5, 66, 31, 30, 29, 8]
FLOAT = Scheme(precision="float32", embedding="float32", method="plain")
NAMES = list(encoder_decoders.CONFIGURATIONS)


def session_of(decoder: Decoder, workdir: Path, scheme: Scheme = FLOAT, *, slots: int = 1) -> DecoderSession:
    compiler = registry.compiler(_BACKEND).decoders()
    assert compiler is not None
    workdir.mkdir(exist_ok=True)
    weights: Any = decoder.weights
    lowered = encoder_decoder.lowered(decoder.spec, weights, compiler, scheme, context=32, workdir=workdir)
    entry = lowered.files[lowered.entry]
    return registry.runtime(_BACKEND).load_decoder(entry, {"threads": 1}, slots=slots, context=32)


def source_of(decoder: Decoder, seed: int = 1, length: int = 13) -> np.ndarray[Any, Any]:
    encoder, random = decoder.spec.encoder, np.random.default_rng(seed)
    assert encoder is not None
    if encoder.kind == "sound":
        return random.normal(0, 1, (encoder.mels, 2 * encoder.context)).astype(np.float32)
    return random.integers(3, encoder_decoders.VOCABULARY, length)


def _error(found: Any, expected: Any) -> float:
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_float64_in_prefill_chunk_and_decode(name: str, tmp_path: Path) -> None:
    decoder = reading.read(encoder_decoders.folder(tmp_path / "model", name))
    source = source_of(decoder)
    expected = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, source).logits(_TOKENS)
    session = session_of(decoder, tmp_path / "made", slots=2)
    session.attend(1, source)
    parts = [session.extend(1, _TOKENS[:7], keep=7), session.extend(1, _TOKENS[7:10], keep=3)]
    parts += [session.step({1: token})[1][None] for token in _TOKENS[10:]]
    assert _error(np.concatenate(parts), expected) < 1e-5


@pytest.mark.parametrize("name", ["t5", "marian", "whisper"])
def test_slots_with_sources_of_their_own_are_decoded_together_as_alone(name: str, tmp_path: Path) -> None:
    decoder = reading.read(encoder_decoders.folder(tmp_path / "model", name))
    session = session_of(decoder, tmp_path / "made", slots=3)
    sources = [source_of(decoder, 2, 20), source_of(decoder, 3, 5)]
    session.attend(0, sources[0])
    session.extend(0, _TOKENS[:9])
    session.attend(2, sources[1])
    session.extend(2, _TOKENS[:4])
    session.copy(0, 1, 9)
    found = session.step({0: 5, 1: 7, 2: 6})
    for slot, source, tokens in ((0, 0, [*_TOKENS[:9], 5]), (1, 0, [*_TOKENS[:9], 7]), (2, 1, [*_TOKENS[:4], 6])):
        plain = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, sources[source])
        assert _error(found[slot], plain.logits(tokens)[-1]) < 1e-5


def test_another_source_replaces_the_one_before_wholly(tmp_path: Path) -> None:
    decoder = reading.read(encoder_decoders.folder(tmp_path / "model", "marian"))
    session = session_of(decoder, tmp_path / "made")
    session.attend(0, source_of(decoder, 4, 30))
    session.extend(0, _TOKENS)
    short = source_of(decoder, 5, 3)
    session.attend(0, short)
    expected = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, short).logits(_TOKENS)
    assert _error(session.extend(0, _TOKENS, keep=len(_TOKENS)), expected) < 1e-5


@pytest.mark.parametrize("name", ["t5-gated", "marian", "whisper"])
@pytest.mark.parametrize("precision", ["int8", "int4", "float16"])
def test_stored_codes_compute_what_they_stand_for(precision: str, name: str, tmp_path: Path) -> None:
    decoder = reading.read(encoder_decoders.folder(tmp_path / "model", name))
    source = source_of(decoder)
    expected = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, source).logits(_TOKENS)
    embedding = "float16" if precision == "float16" else "int8"
    scheme = Scheme(precision=precision, method="plain", group=16, embedding=embedding)
    session = session_of(decoder, tmp_path / "made", scheme)
    session.attend(0, source)
    error = np.abs(session.extend(0, _TOKENS, keep=len(_TOKENS)) - expected).mean() / expected.std()
    assert 0 < error < {"int8": 0.05, "int4": 0.3, "float16": 0.002}[precision]


def test_both_graphs_share_the_embedding_in_one_file(tmp_path: Path) -> None:
    decoder = reading.read(encoder_decoders.folder(tmp_path / "model", "t5"))
    session_of(decoder, tmp_path / "made")
    assert (tmp_path / "made" / "decoder.bin").stat().st_size < 1.3 * decoder.parameters * 4


def test_a_source_that_the_encoder_does_not_take_is_an_error(tmp_path: Path) -> None:
    text = session_of(reading.read(encoder_decoders.folder(tmp_path / "text", "t5")), tmp_path / "a")
    with pytest.raises(InputError, match="has 65 tokens, the encoder takes 1 to 64"):
        text.attend(0, np.zeros(65, np.int64))
    sound = session_of(reading.read(encoder_decoders.folder(tmp_path / "sound", "whisper")), tmp_path / "b")
    with pytest.raises(InputError, match=r"features of \[20, 7\] are given, \[20, 200\] are wanted"):
        sound.attend(0, np.zeros((20, 7), np.float32))


def test_folders_that_are_not_whole_are_errors_that_say_why(tmp_path: Path) -> None:
    folder = encoder_decoders.folder(tmp_path / "t5", "t5")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-200])
    with pytest.raises(ModelError, match="is cut short"):
        reading.read(folder)
    weights.write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        reading.read(folder)
    for key, value, text in (
        ("decoder_start_token_id", None, "decoder_start_token_id"),
        ("d_model", 64, "config.json says"),
        ("feed_forward_proj", "tanh", "the activation 'tanh' is not known"),
    ):
        other = encoder_decoders.folder(tmp_path / key, "t5")
        config = (other / "config.json").read_text()
        (other / "config.json").write_text(json.dumps({**json.loads(config), key: value}))
        with pytest.raises(ModelError, match=text):
            reading.read(other)
