"""Other runtimes of language models, each in a process of its own with the packages of an environment of its own:
onnxruntime-genai, llama.cpp (by xllamacpp) and openvino-genai."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.harness import ROOT, bare_environment

BARE = Path(__file__).parent / "bare"
GENAI, LLAMA, OPENVINO_GENAI = "onnxruntime-genai", "llama-cpp", "openvino-genai"
"""Environments: their packages stand in ``constraints/NAME.txt``."""


class PeerError(RuntimeError):
    """A peer cannot be installed, or fails."""


@dataclass(frozen=True)
class Seconds:
    """What a call cost: of the processor's time, and by the clock."""

    cpu: float
    wall: float


def environment(name: str) -> Path:
    """The Python of an environment, which is made at the first need.

    Raises:
        PeerError: its packages cannot be installed.
    """
    folder, locked = ROOT / f".venv-{name}", ROOT / "constraints" / f"{name}.txt"
    python, done = folder / "bin" / "python", folder / ".installed"
    if done.exists() and done.stat().st_mtime >= locked.stat().st_mtime:
        return python
    ran(name, sys.executable, "-m", "venv", folder)
    ran(name, python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", locked)
    done.touch()
    return python


def ran(name: str, *command: str | Path) -> str:
    """What a peer's command printed.

    Raises:
        PeerError: it failed; the last line of its own words.
    """
    told = {**bare_environment(), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(one) for one in command], capture_output=True, text=True, check=False, env=told)
    if done.returncode:
        raise PeerError(f"{name}: {_last(done.stderr)}")
    return done.stdout


class Peer:
    """A peer's process with its model, see ``bare/decoder_peer.py``.

    Args:
        command: starts it.

    Raises:
        PeerError: it does not start.
    """

    def __init__(self, name: str, *command: str | Path) -> None:
        self.name = name
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [str(one) for one in command],
            env=bare_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        self._answer()

    def read(self, prompt: Sequence[int]) -> Seconds:
        """Read a prompt of which nothing is cached, and write one token."""
        return self._asked(prompt, 0)

    def write(self, prompt: Sequence[int], count: int) -> Seconds:
        """Write so many tokens after the prompt that was read last."""
        return self._asked(prompt, count)

    def _asked(self, prompt: Sequence[int], count: int) -> Seconds:
        if self._process.stdin is not None:
            print(json.dumps({"prompt": list(prompt), "count": count}), file=self._process.stdin, flush=True)
        found = self._answer()
        if found["written"] != count:
            raise PeerError(f"{self.name}: {found['written']} tokens in place of {count}")
        return Seconds(found["cpu"], found["wall"])

    def _answer(self) -> dict[str, Any]:
        line = "" if self._process.stdout is None else self._process.stdout.readline()
        if not line:
            self._process.wait(60)
            self._errors.seek(0)
            raise PeerError(f"{self.name}: {_last(self._errors.read())}")
        found: dict[str, Any] = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(60)
        self._errors.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Own:
    """Kedge's ``Model.generate``.

    Args:
        threads: of the session; the bundle's own is replaced.
    """

    def __init__(self, release: Path, threads: int, *, target: str = "generic-cpu") -> None:
        from kedge_agent import Model
        from kedge_agent.generation.engine import Engine
        from kedge_agent.generation.generator import TextGenerator
        from kedge_protocol.bundle.layout import Layout
        from kedge_targets import registry

        self.name = "Kedge"
        self._model = Model(release, target=target)
        generator = self._model.loaded().generator
        if not isinstance(generator, TextGenerator):
            raise TypeError(release)
        layout = Layout(release)
        bundle = layout.bundle(target)
        files = {title: layout.blob_path(blob.digest).absolute() for title, blob in bundle.files.items()}
        self.size = sum(
            path.stat().st_size for title, path in files.items() if title.startswith(("decoder.", "openvino_model."))
        )
        self._folder = tempfile.TemporaryDirectory()
        for title, path in files.items():
            (Path(self._folder.name) / title).symlink_to(path)
        generator.engine.close()
        self.backend = bundle.config.backend
        session = registry.runtime(self.backend).load_decoder(
            Path(self._folder.name) / bundle.config.entry,
            {"threads": threads},
            slots=1,
            context=generator.spec.context,
        )
        self.engine = generator.engine = Engine(session, guesses=False)
        self.session = session
        self._generator = generator

    def read(self, prompt: Sequence[int]) -> Seconds:
        """See :class:`Peer`."""
        return self._timed(prompt, 1)

    def write(self, prompt: Sequence[int], count: int) -> Seconds:
        """See :class:`Peer`."""
        return self._timed(prompt, count)

    def _timed(self, prompt: Sequence[int], count: int) -> Seconds:
        text = self._generator.tokenizer.decode(prompt, skip_special_tokens=False)
        cpu, wall = time.process_time(), time.perf_counter()
        answer = self._model.generate(text, max_tokens=count, ignore_end=True)
        found = Seconds(time.process_time() - cpu, time.perf_counter() - wall)
        if answer.prompt_tokens != len(prompt) or len(answer.tokens) != count:
            raise RuntimeError(f"{answer.prompt_tokens} tokens were read, {len(answer.tokens)} written")
        return found

    def answer(self, prompt: str, *, guesses: bool, **options: Any) -> float:
        """Processor seconds of going on with a text of which nothing is cached."""
        self.engine._guesses = guesses
        for slot in self.engine._slots:
            slot.tokens = []
        cpu = time.process_time()
        self._model.generate(prompt, ignore_end=True, **options)
        return time.process_time() - cpu

    def close(self) -> None:
        """Release the model."""
        self._model.close()
        self._folder.cleanup()

    def __enter__(self) -> Own:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last(said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no word"
