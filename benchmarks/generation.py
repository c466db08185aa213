"""Text generation with stories260K: engine against bare loop, several clients against one, a second turn against a
cold one, and what four bits cost. Speeds in CPU seconds: the engine has a thread of its own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import generation_intel, generation_smollm2
from benchmarks.harness import SHARED, Result, medians

MODEL = SHARED / "generation" / "stories260k"
ROUNDS, TOKENS, CLIENTS = 9, 200, 4
_PROMPT = "Once upon a time, there was a little girl. "


def run() -> Iterator[Result]:
    """All rows; those of stories260K only where the shared data are there."""
    yield from _stories()
    yield from generation_smollm2.run()
    yield from generation_intel.run()


def _stories() -> Iterator[Result]:
    if not MODEL.is_dir():
        print(f"generation: the shared data are not there: {MODEL}")
        return
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        _texts(place)
        yield from _speeds(place)
        yield from _quality(place)


def _release(place: Path, out: str, quantize: str) -> Path:
    import kedge

    return kedge.compile(
        MODEL,
        name="stories",
        version="1",
        targets=[str(_target(place))],
        calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt",
        out=place / out,
        quantize=quantize,
        max_perplexity="9x",
        slots=CLIENTS,
    ).path


def _target(place: Path) -> Path:
    """``generic-cpu`` with one thread, so that no CPU time is spent on waiting."""
    from kedge_targets.target import DEVICES

    path = place / "one-thread.toml"
    path.write_text((DEVICES / "generic-cpu.toml").read_text().replace("threads = 0", "threads = 1"))
    return path


def _texts(place: Path) -> None:
    """What the float model writes: its own training data are not at hand."""
    from kedge_agent import Model

    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text(_PROMPT * 60)
    with Model(_release(place, "float", "precision=float32"), target="generic-cpu") as model:
        for name, seed in (("calibration", 0), ("evaluation", 100)):
            answers = [
                model.generate("", max_tokens=255, temperature=1.0, seed=seed + at, ignore_end=True) for at in range(16)
            ]
            (place / f"{name}.txt").write_text("\n".join(answer.text for answer in answers))


def _cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return (time.process_time() - start) * 1000


def _speeds(place: Path) -> Iterator[Result]:
    from kedge_agent import Model

    with Model(place / "float", target="generic-cpu") as model:
        generator = model.loaded().generator
        session = generator.engine.session
        prompt = generator.tokens(_PROMPT)

        def bare() -> None:
            session.truncate(0, 0)
            logits = session.extend(0, prompt)[0]
            for _ in range(TOKENS - 1):
                logits = session.step({0: int(logits.argmax())})[0]
            # What the engine believes to be cached is gone: its next answer is cold.
            session.truncate(0, 0)

        def engine(text: str = _PROMPT) -> None:
            for slot in generator.engine._slots:
                slot.tokens = []
            model.generate(text, max_tokens=TOKENS, ignore_end=True)

        def together() -> None:
            streams = [
                model.generate(f"{at} {_PROMPT}", stream=True, max_tokens=TOKENS, ignore_end=True)
                for at in range(CLIENTS)
            ]
            for stream in streams:
                stream.finish()

        def in_turn() -> None:
            for at in range(CLIENTS):
                engine(f"{at} {_PROMPT}")

        own, loop = medians(ROUNDS, lambda: _cpu(engine), lambda: _cpu(bare))
        yield Result(
            "generation: engine", f"{TOKENS} tokens, CPU", "ms", own, loop, "bare loop", "≤1.05", own <= 1.05 * loop
        )
        many, alone = medians(ROUNDS, lambda: _cpu(together), lambda: _cpu(in_turn))
        yield Result(
            "generation: 4 clients",
            "at once, CPU",
            "ms",
            many,
            alone,
            "one after the other",
            "≤0.56",
            many <= 0.56 * alone,
        )
        history = _PROMPT * 30

        def first_token(cold: bool) -> float:
            if cold:
                for slot in generator.engine._slots:
                    slot.tokens = []
            return _cpu(lambda: model.generate(f"{history} She", max_tokens=1, ignore_end=True))

        first_token(True)
        warm, cold = medians(ROUNDS, lambda: first_token(False), lambda: first_token(True))
        yield Result(
            "generation: second turn", "to the first token, CPU", "ms", warm, cold, "cold", "≤0.15", warm <= 0.15 * cold
        )


def _quality(place: Path) -> Iterator[Result]:
    import kedge

    found = {}
    for name, quantize in (
        ("gptq", "precision=int4"),
        ("plain", "precision=int4,method=plain"),
        ("int8", "precision=int8"),
    ):
        report = kedge.Release.open(_release(place, name, quantize)).generation
        if report is not None:
            found[name] = report.targets[0].attempt.figures
    gptq, plain, eight = found["gptq"], found["plain"], found["int8"]
    yield Result(
        "generation: KL of int4",
        "GPTQ, g32",
        "nats",
        gptq.kl,
        plain.kl,
        "plain rounding",
        "≤0.60",
        gptq.kl <= 0.6 * plain.kl,
    )
    for name, one, most in (("int4", gptq, 1.055), ("int8", eight, 1.005)):
        met = one.ratio <= most
        yield Result(
            f"generation: perplexity of {name}",
            "stories260K",
            "",
            one.perplexity,
            one.reference,
            "float",
            f"≤{most}",
            met,
        )
