"""SmolLM2-135M-Instruct in four bits on intel-cpu beside openvino-genai, which opens the files that Kedge writes for
OpenVINO: the same bits. Kedge runs what its compile chose by measurement; its own OpenVINO session is shown too.

Speed does not depend on the codes, so weights are rounded plainly. ``KEDGE_BENCH_FOLDER`` names a folder that keeps the
files that were made, for another run.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.generation_peers import BARE, OPENVINO_GENAI, Own, Peer, PeerError, environment
from benchmarks.harness import Result, medians

CONTEXT = 2304
_SHORT, _LONG, _WRITTEN = 64, 2048, 32
_MEASURED = ((_SHORT, 0, 7), (_SHORT, _WRITTEN, 7), (_LONG, _WRITTEN, 3))
"""Positions before, tokens that are written after them (0: they are read), rounds."""


def run() -> Iterator[Result]:
    """All rows, of the processor's time with one thread."""
    with ExitStack() as stack:
        kept = os.environ.get("KEDGE_BENCH_FOLDER")
        place = Path(kept or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        place.mkdir(parents=True, exist_ok=True)
        chosen, openvino = _releases(place)
        try:
            peer = stack.enter_context(_peer(place, openvino))
        except PeerError as error:
            print(f"failed: {error}")
            return
        own = stack.enter_context(Own(chosen, 1, target="intel-cpu"))
        other = stack.enter_context(Own(openvino, 1, target="intel-cpu"))
        yield from _speeds(place, own, other, peer)


def _releases(place: Path) -> tuple[Path, Path]:
    """What the compile chose, and the same for OpenVINO by a recipe."""
    from tests.support import smollm2

    if not (place / "evaluation.txt").exists():
        smollm2.folder(place / "model")
        smollm2.texts(place)
    if not (place / "intel").exists():
        _compiled(place, "intel", quantize="precision=int4,method=plain")
    if not (place / "intel-openvino").exists():
        text = (place / "intel" / "recipe.toml").read_text(encoding="utf-8")
        recipe = place / "openvino.toml"
        recipe.write_text(text.replace('backend = "onnxruntime"', 'backend = "openvino"'), encoding="utf-8")
        _compiled(place, "intel-openvino", recipe=recipe)
    return place / "intel", place / "intel-openvino"


def _compiled(place: Path, out: str, **options: Any) -> None:
    import kedge

    release = kedge.compile(
        place / "model", name="assistant", version="1", targets=["intel-cpu"], max_perplexity="9x", context=CONTEXT,
        calibration=place / "calibration.txt", evaluation=place / "evaluation.txt", out=place / out, **options,
    )  # fmt: skip
    if release.generation is not None:
        for pace in release.generation.targets[0].paces:
            print(f"compile: {pace.said}")


def _peer(place: Path, release: Path) -> Peer:
    """openvino-genai with the files of a bundle."""
    from kedge_protocol.bundle.layout import Layout

    folder, layout = place / "openvino-genai", Layout(release)
    folder.mkdir(exist_ok=True)
    for title, blob in layout.bundle("intel-cpu").files.items():
        link = folder / title
        link.unlink(missing_ok=True)
        link.symlink_to(layout.blob_path(blob.digest).absolute())
    settings = (place / "model" / "config.json").read_text(encoding="utf-8")
    (folder / "config.json").write_text(settings, encoding="utf-8")
    ends = {"eos_token_id": json.loads(settings)["eos_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(ends), encoding="utf-8")
    python = environment(OPENVINO_GENAI)
    return Peer("openvino-genai", python, BARE / "ov_genai.py", folder, "1", str(CONTEXT))


def _speeds(place: Path, own: Own, other: Own, peer: Peer) -> Iterator[Result]:
    from tokenizers import Tokenizer

    text = (place / "evaluation.txt").read_text(encoding="utf-8")
    stream: list[int] = Tokenizer.from_file(str(place / "model" / "tokenizer.json")).encode(text).ids

    def speed(one: Own | Peer, length: int, count: int) -> Callable[[], float]:
        """Tokens a CPU second: read where ``count`` is 0, else written after the prompt that was read before."""
        places = iter(range(0, 1 << 30, length + 1))

        def measured() -> float:
            # Another prompt each time, so that nothing of it is cached.
            at = 0 if count else next(places) % (len(stream) - length)
            taken = one.write(stream[:length], count) if count else one.read(stream[at : at + length])
            return (count or length) / taken.cpu

        return measured

    everyone: tuple[Own | Peer, ...] = (own, other, peer)
    for length, count, rounds in _MEASURED:
        if count:
            for one in everyone:
                one.read(stream[:length])
        chosen, openvino, theirs = medians(rounds, *(speed(one, length, count) for one in everyone))
        what = f"intel-cpu: written after {length}" if count else f"intel-cpu: {length} read"
        span, unit = f"SmolLM2 int4, 1 thread, {own.backend} chosen", "tokens/CPU s"
        yield Result(what, span, unit, chosen, theirs, peer.name, "≥1.0", chosen >= theirs)
        yield Result(what, "Kedge by OpenVINO", unit, openvino, theirs, peer.name, "shown", True)
