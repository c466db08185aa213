"""The figures of language models for ``/metrics``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from kedge_agent.generation.engine import Engine
from kedge_agent.generation.engines import Engines
from kedge_agent.generation.statistics import FIRST_TOKEN_BOUNDS

Labels = Callable[..., str]
Family = Callable[[str, str, str], Iterator[str]]


def lines(engines: Sequence[tuple[dict[str, str], Engine | Engines]], family: Family, labels: Labels) -> Iterator[str]:
    """Yield lines in the text format of Prometheus.

    Args:
        engines: labels and engine of each language model.
        family: yields the two lines above a metric, from its name, kind and description.
        labels: writes labels, from the model's and further labels.
    """
    for metric, kind, text, read in _SIMPLE:
        yield from family(metric, kind, text)
        for name, engine in engines:
            yield f"{metric}{labels(name)} {read(engine)!r}"
    yield from family("kedge_generation_answers_total", "counter", "Answers, by the reason of their end.")
    for name, engine in engines:
        for reason, count in sorted(engine.statistics.ended.items()):
            yield f"kedge_generation_answers_total{labels(name, reason=reason)} {count}"
    metric = "kedge_generation_first_token_seconds"
    yield from family(metric, "histogram", "From a request to the first token of its answer.")
    for name, engine in engines:
        so_far = 0
        for bound, count in zip([*map(repr, FIRST_TOKEN_BOUNDS), "+Inf"], engine.statistics.first_tokens, strict=True):
            so_far += count
            yield f"{metric}_bucket{labels(name, le=bound)} {so_far}"
        yield f"{metric}_sum{labels(name)} {engine.statistics.first_token_seconds!r}"
        yield f"{metric}_count{labels(name)} {so_far}"


_SIMPLE: tuple[tuple[str, str, str, Callable[[Engine | Engines], float]], ...] = (
    ("kedge_generation_waiting", "gauge", "Answers that wait for a slot.", lambda e: e.waiting),
    ("kedge_generation_running", "gauge", "Answers that have a slot.", lambda e: e.running),
    (
        "kedge_generation_cache_bytes",
        "gauge",
        "Bytes of keys and values of all slots.",
        lambda e: e.cache_bytes,
    ),
    ("kedge_generation_cache_positions", "gauge", "Positions in use in all slots.", lambda e: e.positions),
    ("kedge_generation_prompt_tokens_total", "counter", "Tokens of prompts.", lambda e: e.statistics.prompt_tokens),
    (
        "kedge_generation_cached_tokens_total",
        "counter",
        "Tokens of prompts that were not read anew.",
        lambda e: e.statistics.cached_tokens,
    ),
    ("kedge_generation_tokens_total", "counter", "Tokens of answers.", lambda e: e.statistics.written_tokens),
    (
        "kedge_generation_guessed_tokens_total",
        "counter",
        "Tokens that were guessed from the text so far.",
        lambda e: e.statistics.guessed_tokens,
    ),
    (
        "kedge_generation_right_tokens_total",
        "counter",
        "Guessed tokens that came true.",
        lambda e: e.statistics.right_tokens,
    ),
    (
        "kedge_generation_writing_seconds_total",
        "counter",
        "Time from the first tokens of answers to their ends.",
        lambda e: e.statistics.writing_seconds,
    ),
)
