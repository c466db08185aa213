"""stories260K, a real model of 260 thousand weights: its well-known text, and what four bits cost it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import decoders

import kedge
from kedge.importing.decoders import reading
from kedge_agent import Model
from kedge_agent.generation.engine import Engine
from kedge_agent.generation.sampling import Sampling
from kedge_agent.generation.tickets import Order

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "generation" / "stories260k"

pytestmark = pytest.mark.shared_data

_BEGINNING = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
    "big, red ball. She wanted to play with it, but it was too high.\nLily"
)


def _compiled(place: Path, out: str, quantize: str | None, *, max_perplexity: str = "9x") -> kedge.Release:
    return kedge.compile(
        SHARED,
        name="stories",
        version="1.0",
        targets=["generic-cpu"],
        calibration=place / "calibration",
        evaluation=place / "evaluation",
        out=place / out,
        quantize=quantize,
        max_perplexity=max_perplexity,
        slots=4,
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that the float model wrote itself: what it was trained on is not at hand."""
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not there: {SHARED}")
    path = tmp_path_factory.mktemp("stories")
    for name in ("calibration", "evaluation"):
        (path / name).mkdir()
        (path / name / "a.txt").write_text("Once upon a time, there was a little girl. " * 60)
    release = _compiled(path, "float", "precision=float32")
    with Model(release.path, target="generic-cpu") as model:
        for name, first in (("calibration", 0), ("evaluation", 100)):
            streams = [
                model.generate("", stream=True, max_tokens=255, temperature=1.0, seed=first + at, ignore_end=True)
                for at in range(16)
            ]
            (path / name / "a.txt").write_text("\n".join(stream.finish().text for stream in streams))
    return path


def test_the_greedy_story_is_the_well_known_one(place: Path) -> None:
    with Model(place / "float", target="generic-cpu") as model:
        assert model.generate("Once upon a time", max_tokens=60).text == _BEGINNING.removeprefix("Once upon a time")


def test_two_hundred_greedy_tokens_are_those_of_a_float64_decoder(place: Path) -> None:
    decoder = reading.read(SHARED)
    with Model(place / "float", target="generic-cpu") as model:
        tokens = model.loaded().generator.tokens("")
        found = model.generate("", max_tokens=200, ignore_end=True)
    logits = decoders.PlainDecoder(decoder.spec, decoder.weights).logits([*tokens, *found.tokens])
    assert list(found.tokens) == logits[len(tokens) - 1 : -1].argmax(-1).tolist()


def test_guessed_tokens_change_no_answer(place: Path) -> None:
    with Model(place / "float", target="generic-cpu") as model:
        generator = model.loaded().generator
        story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        orders = [
            Order(prompt=generator.tokens(prompt), max_tokens=150, sampling=sampling)
            for prompt, sampling in (
                ("", Sampling()),
                (story * 3, Sampling()),
                (story * 3, Sampling(temperature=0.7, top_p=0.9, seed=5)),
                (story, Sampling(temperature=1.0, repetition_penalty=1.1, seed=6)),
            )
        ]
        session = generator.engine.session
        engines = Engine(session), Engine(session, guesses=False)
        guessing, plain = ([[one.id for one in engine.submit(order)] for order in orders] for engine in engines)
    assert guessing == plain
    found = engines[0].statistics
    assert 0 < found.right_tokens <= found.guessed_tokens
    assert engines[1].statistics.guessed_tokens == 0


def test_keys_and_values_in_int8_choose_the_same_token(place: Path) -> None:
    found = _compiled(place, "cache", "precision=float32,cache=int8").generation
    assert found is not None
    one = found.targets[0]
    assert one.attempt.figures.kl <= 0.002
    assert one.attempt.figures.ratio <= 1.005
    # 5 layers of 4 heads of 8 channels, which the kernel fills up to 16; a byte each.
    assert one.position_bytes == 2 * 5 * 4 * 16
    with Model(place / "cache", target="generic-cpu") as model:
        assert model.generate("Once upon a time", max_tokens=60).text == _BEGINNING.removeprefix("Once upon a time")


def test_between_four_and_eight_bits_the_layers_that_lose_most_get_eight(place: Path) -> None:
    found = _compiled(place, "mixed", None, max_perplexity="1.04x").generation
    assert found is not None
    *tried, last = found.targets[0].attempts
    assert [one.scheme.precision for one in tried] == ["int4"] * len(tried)
    assert 0 < len(last.scheme.int8_layers) < 5
    assert last.figures.ratio <= 1.04
    assert last.bytes < 488_258 * 0.95  # of all layers in 8 bits
    assert Model(place / "mixed", target="generic-cpu").config.precision == "mixed"


def test_compensated_rounding_takes_away_two_fifths_of_what_plain_rounding_costs(place: Path) -> None:
    figures = {}
    for method in ("plain", "gptq"):
        found = _compiled(place, method, f"precision=int4,method={method}").generation
        assert found is not None
        figures[method] = found.targets[0].attempt.figures
    assert figures["gptq"].kl <= 0.65 * figures["plain"].kl
    assert figures["gptq"].ratio <= 1.08
