"""The steps of ``make demo ARGS=ocr``: train three small models that read text, compile them for two targets, roll them
out to two devices; a photo goes in, text comes out."""

from __future__ import annotations

import io
import json
import time
import urllib.error
import urllib.request
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge.demo import lettering, readers
from kedge.demo.processes import DemoError, command_of, run, say
from kedge.demo.site import Agent, Site, staged

Array = npt.NDArray[Any]

DEVICES = {"till": "generic-cpu", "kitchen-pi": "rpi4"}
RECEIPT = ("KEDGE CAFE", "TABLE 7", "ESPRESSO 2.40", "WATER 3.10", "CAKE 4.90", "TOTAL 10.40")
_LEAST_RIGHT = 0.75
"""The share of the photo's characters that each device must read: models trained for a minute misread some."""
_PAGES = 40
"""Drawn pages, and lines, for calibration; as many for evaluation."""


def show_reading(*, keep: bool) -> None:
    """Run the demo.

    Args:
        keep: leave everything running at the end and print how to inspect it.

    Raises:
        KedgeError: a step failed.
    """
    staged(_chapters, _say_how_to_look, DEVICES, keep=keep)


def _say_how_to_look(folder: Path, site: Site) -> None:
    for agent in site.agents:
        say(f"   curl --data-binary @{folder / 'photo.jpg'} -H 'Content-Type: image/jpeg' {_url(agent)}")


def _chapters(folder: Path, site: Site) -> None:
    say("1. Train three small models on drawn text: one finds lines, one tells upside down, one reads")
    say("   (about a minute and a half on two idle cores)\n")
    for name, train, size, output in (
        ("find", readers.finder, readers.PAGE, "map"),
        ("turn", readers.direction, (128, lettering.LINE_HEIGHT), "scores"),
        ("read", readers.reader, readers.LINE, "steps"),
    ):
        began = time.monotonic()
        readers.export(train(), folder / f"{name}.onnx", size, output)
        say(f"   {name}: {time.monotonic() - began:.0f} s")

    say("\n2. Compile them for two targets; the pipeline says how they follow each other\n")
    _draw(folder)
    releases = [_compile(folder, name) for name in ("read", "turn", "find")]

    say("3. Start a broker, the controller and two agents; publish and roll out\n")
    site.start()
    for name, release in zip(("read", "turn", "find"), releases, strict=True):
        site.command("publish", str(release))
        status = site.rollout(f"{name}:1.0")
        if not status.done:
            reasons = "; ".join(f"{one.device}: {one.progress.value} {one.detail}" for one in status.devices)
            raise DemoError(f"the rollout of {name} did not end well: {reasons}", where=str(folder))
        say(f"   {name} 1.0: done on {', '.join(one.device for one in status.devices)}")

    say("\n4. A photo of a receipt goes in, text comes out\n")
    photo = (folder / "photo.jpg").read_bytes()
    for agent in site.agents:
        began = time.monotonic()
        lines = [one["then"]["text"].strip() for one in post_picture(_url(agent), photo)]
        took = (time.monotonic() - began) * 1000
        right = share_right(RECEIPT, lines)
        say(f"   {agent.name} ({agent.target}), {took:.0f} ms, {right:.0%} of the characters:")
        say("".join(f"      {line}\n" for line in lines))
        if right < _LEAST_RIGHT:
            raise DemoError(f"{agent.name} read only {right:.0%} of the photo", where=str(folder / "photo.jpg"))


def _draw(folder: Path) -> None:
    """Draw what the compiler calibrates with, and the photo."""
    from PIL import Image

    rng = np.random.default_rng(readers.SEED + 3)
    for kind in ("pages", "lines"):
        for role in ("train", "val"):
            (folder / kind / role).mkdir(parents=True)
    for number in range(2 * _PAGES):
        role = "train" if number < _PAGES else "val"
        texts = [lettering.words(rng, int(rng.integers(3, 16))) for _ in range(6)]
        pixels, _ = lettering.page(texts, rng, size=readers.PAGE, angle=float(rng.uniform(-6, 6)))
        Image.fromarray(pixels).save(folder / "pages" / role / f"{number:02d}.png")
        pixels = lettering.line(lettering.words(rng, int(rng.integers(3, 19))), rng).pixels
        if number % 2:
            pixels = np.ascontiguousarray(np.rot90(pixels, 2))
        Image.fromarray(pixels).save(folder / "lines" / role / f"{number:02d}.png")
    receipt, _ = lettering.page(RECEIPT, np.random.default_rng(1), size=readers.PAGE, angle=4.0)
    Image.fromarray(receipt).save(folder / "photo.jpg", quality=90)
    (folder / "alphabet.txt").write_text("\n".join(lettering.ALPHABET) + "\n")
    (folder / "degrees.txt").write_text("0\n180\n")
    (folder / "find.toml").write_text(
        'task = "ocr"\n\n'
        f"[regions]\ngrow = {readers.GROW}\nscore_floor = 0.3\n\n"
        '[then]\nmodel = "read"\nturned_by = "turn"\nanswer_floor = 0.5\n'
    )
    (folder / "read.toml").write_text('task = "ocr"\n\n[sequence]\nspace = true\n')


def _compile(folder: Path, name: str) -> Path:
    out = folder / f"OUT-{name}"
    data = str(folder / ("pages" if name == "find" else "lines"))
    how = {
        "find": ["--pipeline", str(folder / "find.toml")],
        "turn": ["--task", "ocr", "--labels", str(folder / "degrees.txt")],
        "read": ["--pipeline", str(folder / "read.toml"), "--labels", str(folder / "alphabet.txt")],
    }[name]
    targets = [part for target in DEVICES.values() for part in ("--target", target)]
    command = [command_of("kedge"), "compile", str(folder / f"{name}.onnx"), "--name", name, "--version", "1.0"]
    say(run([*command, *targets, "--calibration", data, "--evaluation", data, *how, "-o", str(out)]))
    return out


def _url(agent: Agent) -> str:
    return f"{agent.endpoint}/v2/models/find/pipeline"


def post_picture(url: str, jpeg: bytes, *, seconds: float = 30.0) -> list[dict[str, Any]]:
    """Send a picture to a pipeline and return its answer.

    Raises:
        DemoError: there is no connection, or the status is an error.
    """
    request = urllib.request.Request(url, data=jpeg, headers={"Content-Type": "image/jpeg"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            answer: list[dict[str, Any]] = json.load(io.BytesIO(response.read()))["answer"]
            return answer
    except urllib.error.HTTPError as error:
        raise DemoError(f"status {error.code}: {error.read().decode(errors='replace')}", where=url) from error
    except OSError as error:
        raise DemoError(str(error), where=url) from error


def share_right(wanted: tuple[str, ...], found: list[str]) -> float:
    """Return the share of the wanted characters that were found, in order."""
    left, right = "\n".join(wanted), "\n".join(found)
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) / max(len(left), len(right))
