"""Random language models compiled in parts, and their parts loaded side by side in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import kedge
from kedge_agent import Model
from kedge_agent.split import settings as split_settings
from kedge_agent.split.settings import SplitSettings
from tests.support import decoders
from tests.support.installed import install
from tests.support.ports import free_port


def compiled(
    place: Path,
    out: str,
    *,
    parts: int | None,
    seed: float = 1.0,
    kind: str = "llama",
    changed: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Compile a random model of 100 letters and 3 layers; return the folder of its release or of its parts.

    Args:
        seed: a factor of its weights: another model for each.
        kind, changed: see :func:`tests.support.decoders.folder`.
    """
    sizes: dict[str, Any] = {"max_position_embeddings": 512, "vocab_size": 100, "eos_token_id": None} | dict(
        changed or {}
    )
    model = place / f"{kind}-{seed}"
    decoders.folder(model, kind, changed=sizes, stored=lambda one: np.asarray(one * seed, np.float32))
    texts = place / "texts.txt"
    random = np.random.default_rng(3)
    texts.write_text("".join(chr(40 + at) for at in random.integers(0, 50, 2500)))
    given: dict[str, Any] = {"name": "writer", "version": "1.0", "targets": ["generic-cpu"], "slots": 4}
    # In float, for the same tokens however many of them are guessed, which depends on the time of a step.
    given |= {"quantize": "precision=float32", "max_perplexity": "9x"} | options
    kedge.compile(model, calibration=texts, evaluation=texts, out=place / out, split=parts, **given)
    return place / out


class Parts:
    """The parts of a model on so many devices of one process, each with a state folder of its own.

    Args:
        folder: holds the parts' releases.
        security: certificates for all links.
    """

    def __init__(self, place: Path, folder: Path, security: SplitSettings | None = None) -> None:
        self.releases = sorted(folder.glob("part-*"))
        self._place, self._security = place, security or SplitSettings()
        self.addresses = [f"127.0.0.1:{free_port()}" for _ in self.releases]
        self.models: dict[int, Model] = {}

    def load(self, index: int, *, model: str = "writer", **changed: Any) -> Model:
        """Load a part, from 0 on; ``changed`` are other settings of its device."""
        name = model if index == 0 else f"{model}-part-{index + 1}"
        state = self._place / f"device-{index}"
        install(state, self.releases[index])
        settings = replace(self._security, seconds=20.0)
        if index:
            settings = replace(settings, listen=self.addresses[index])
        if index + 1 < len(self.addresses):
            settings = replace(settings, next={name: self.addresses[index + 1]})
        split_settings.write(state, replace(settings, **changed))
        self.models[index] = Model(name, state=state)
        return self.models[index]

    def close(self) -> None:
        """Close all models."""
        for model in self.models.values():
            model.close()


@functools.cache
def greedy(release: Path, prompt: str, count: int) -> tuple[int, ...]:
    """Return the tokens that a whole model writes."""
    with Model(release, target="generic-cpu") as model:
        return model.generate(prompt, max_tokens=count, ignore_end=True).tokens
