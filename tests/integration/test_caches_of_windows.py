"""Layers that see a window keep a window: the caches do not grow with the context, and say the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.integration.test_decoder_graphs import FLOAT, session_of
from tests.support import decoders

from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_layers import LayerSource, QuantizedLayers
from kedge_agent.generation.engine import Engine
from kedge_agent.generation.tickets import Order
from kedge_protocol.errors import InputError
from kedge_targets import registry
from kedge_targets.decoder.contract import Ends

CONTEXT, ROOM = 512, 6 + 64
TOKENS = np.random.default_rng(0).integers(3, 90, 300).tolist()


def decoder_of(name: str, place: Path) -> Decoder:
    return reading.read(decoders.folder(place / name, name, changed={"max_position_embeddings": CONTEXT}))


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("cache", ["float32", "int8"])
def test_far_beyond_the_window_logits_are_those_of_a_float64_decoder(name: str, cache: str, tmp_path: Path) -> None:
    decoder = decoder_of(name, tmp_path)
    expected = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(TOKENS)
    calibration = [np.random.default_rng(at).integers(1, decoders.VOCABULARY, 24).tolist() for at in range(60)]
    scheme, learned = (FLOAT, None) if cache == "float32" else (replace(FLOAT, cache="int8"), calibration)
    session = session_of(decoder, tmp_path / "made", scheme, slots=2, context=CONTEXT, calibration=learned)
    # A chunk longer than the cache, a chunk after it, then one by one.
    parts = [session.extend(1, TOKENS[:150], keep=150), session.extend(1, TOKENS[150:160], keep=10)]
    parts += [session.step({1: token})[1][None] for token in TOKENS[160:]]
    error = (np.concatenate(parts) - expected) / expected.std()
    if cache == "float32":
        assert np.abs(error).max() < 1e-5
    else:
        assert np.sqrt((error**2).mean()) < 0.02


@pytest.mark.parametrize(("name", "windows"), [("mistral", 3), ("gemma3", 2)])
def test_memory_is_bounded_by_the_window_in_the_plan_and_in_truth(name: str, windows: int, tmp_path: Path) -> None:
    decoder = decoder_of(name, tmp_path)
    compiler = registry.compiler("onnxruntime").decoders()
    assert compiler is not None
    weights = decoder.weights
    head = None if decoder.spec.tied else weights.outer("head")
    ends = Ends(embedding=weights.outer("embedding"), positions=None, norm={"norm": weights.outer("norm")}, head=head)
    source = LayerSource(decoder.spec, weights, compiler, CONTEXT)
    layers = QuantizedLayers(source, FLOAT, [], lambda done, total: None)
    made = compiler.lower(decoder.spec, ends, layers, context=CONTEXT, workdir=tmp_path)
    a_position = 2 * 4 * decoder.spec.kv_heads * compiler.layout(decoder.spec).size
    assert made.window_bytes == windows * ROOM * a_position
    assert made.position_bytes == (3 - windows) * a_position
    assert made.runtimes[0].minimum == "1.31"
    session = registry.runtime("onnxruntime").load_decoder(made.files[made.entry], {}, slots=4, context=CONTEXT)
    assert session.cache_bytes == 4 * (CONTEXT * made.position_bytes + made.window_bytes)
    for kind in decoder.spec.layers:
        assert compiler.cache_positions(kind, CONTEXT) == (CONTEXT if kind.window is None else ROOM)
        assert compiler.cache_positions(kind, 64) == 64  # a context that is hardly longer than the window


def test_a_slot_that_is_cut_goes_on_as_if_it_had_never_been_longer(tmp_path: Path) -> None:
    session = session_of(decoder_of("gemma3", tmp_path), tmp_path / "made", slots=2, context=CONTEXT)
    kept, refused = 0, 0
    for positions in (69, 70, 71, 100, 134, 135, 136, 200, 265):
        for fewer in (1, 2, 5, 40):
            session.truncate(0, 0)
            session.extend(0, TOKENS[:positions])
            if not session.can_keep(positions, positions - fewer):
                refused += 1
                with pytest.raises(InputError, match="was dropped"):
                    session.truncate(0, positions - fewer)
                continue
            kept += 1
            session.truncate(0, positions - fewer)
            session.copy(0, 1, positions - fewer)
            session.truncate(0, 0)
            expected = session.extend(0, TOKENS[: positions - fewer + 1])
            found = session.step({1: TOKENS[positions - fewer]})[1]
            np.testing.assert_allclose(found, expected[0], atol=1e-4 * expected.std())
    assert kept > 10
    assert refused > 5


def test_a_slot_between_two_that_write_keeps_what_it_sees(tmp_path: Path) -> None:
    session = session_of(decoder_of("mistral", tmp_path), tmp_path / "made", slots=3, context=CONTEXT)
    for slot, count in enumerate((20, ROOM, 30)):
        session.extend(slot, TOKENS[:count])
    for at in range(5):
        session.step({0: TOKENS[20 + at], 2: TOKENS[30 + at]})
    found = session.step({0: TOKENS[25], 1: TOKENS[ROOM], 2: TOKENS[35]})
    for slot, count in enumerate((26, ROOM + 1, 36)):
        session.truncate(slot, 0)
        expected = session.extend(slot, TOKENS[:count])[0]
        np.testing.assert_allclose(found[slot], expected, atol=1e-4 * expected.std())


def test_an_engine_reuses_what_is_still_there_and_reads_the_rest_anew(tmp_path: Path) -> None:
    engine = Engine(session_of(decoder_of("mistral", tmp_path), tmp_path / "made", slots=2, context=CONTEXT))
    cached = []
    # The last repeats: guesses that turn out wrong have to be taken back across a move.
    for prompt in (TOKENS[:200], TOKENS[:220], TOKENS[:90], TOKENS[:200], [7, 8, 9] * 40):
        ticket = engine.submit(Order(prompt=prompt, max_tokens=90))
        found = [token.id for token in ticket]
        cached.append(ticket.cached)
        fresh = Engine(session_of(decoder_of("mistral", tmp_path), tmp_path / "fresh", slots=1, context=CONTEXT))
        assert found == [token.id for token in fresh.submit(Order(prompt=prompt, max_tokens=90))]
        fresh.close()
    engine.close()
    assert cached[0] == 0
