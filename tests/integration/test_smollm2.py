"""SmolLM2-135M-Instruct, with its channels in another order: what compression costs a model of use."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import smollm2

import kedge
from kedge.evaluation.decoders.figures import Figures
from kedge_agent import Model

pytestmark = [pytest.mark.campaign, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    smollm2.folder(path / "model")
    smollm2.texts(path)
    return path


def compiled(place: Path, quantize: str) -> Figures:
    target = str(smollm2.roomy(place / "roomy.toml"))
    release = kedge.compile(
        place / "model", name="assistant", version="1.0", targets=[target], context=2048,
        calibration=place / "calibration.txt", evaluation=place / "evaluation.txt",
        quantize=quantize, max_perplexity="9x", out=place / quantize,
    )  # fmt: skip
    assert release.generation is not None
    figures = release.generation.targets[0].attempt.figures
    print(quantize, figures)
    return figures


def test_keys_and_values_in_int8_say_nearly_the_same_at_a_long_context(place: Path) -> None:
    for quantize in ("precision=float32", "precision=float32,cache=int8"):
        compiled(place, quantize)
    found = smollm2.apart(place / "precision=float32,cache=int8", place / "precision=float32", place / "evaluation.txt")
    print(found)
    assert found.tokens == smollm2.LONG
    # The goal is 0.99, which steps of a static size do not reach: docs/benchmarks.md says why.
    assert found.agreement >= 0.975
    assert found.kl <= 0.0011


def test_compensated_rounding_takes_away_half_of_what_plain_rounding_costs(place: Path) -> None:
    plain = compiled(place, "precision=int4,method=plain")
    learned = compiled(place, "precision=int4,method=gptq")
    eight = compiled(place, "precision=int8,method=plain")
    assert learned.kl <= 0.55 * plain.kl
    assert learned.ratio <= 1.13
    # Over 3060 tokens the ratio of perplexities is known to about half a hundredth; the divergence is less noisy.
    assert eight.ratio <= 1.01
    assert eight.kl <= 0.01
    with Model(place / "precision=int4,method=gptq", target="generic-cpu") as model:
        answer = model.generate([{"role": "user", "content": "What is the capital of France?"}], max_tokens=30)
    assert "Paris" in answer.text
