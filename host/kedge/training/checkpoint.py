"""Checkpoints of a training on disk: written atomically, and resumed only by exactly the same training."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from kedge_protocol import files

Tensor: TypeAlias = torch.Tensor

_SHARE = 0.05
"""Share of the time that saving may take."""


@dataclass(kw_only=True)
class State:
    """Everything that the loop needs to resume.

    Attributes:
        step: position in the schedule of this attempt.
        skipped: steps of the schedule that were skipped, to cool down early.
        learning_rate: of this attempt.
        before, best_loss: held-out loss of the initial parameters, and of ``best``.
        stale: evaluations since the best one.
        attempt: number of restarts.
        finished: whether nothing is left to do.
        parameters, best: values, in the order of the parameters.
        optimizer: state of the optimizer; None at the beginning of an attempt.
    """

    step: int
    skipped: int
    learning_rate: float
    before: float
    best_loss: float
    stale: int
    attempt: int
    finished: bool
    parameters: list[Tensor]
    best: list[Tensor]
    optimizer: dict[str, Any] | None


class Checkpoint:
    """The checkpoint file of one training.

    Args:
        folder: made if it does not exist.
        what: the beginning of the file's name.
        parts: all that determines the result (graph, teacher, options, samples, seed); their digest is in the name.

    Attributes:
        notes: what went wrong with the checkpoint; training continues without it.
    """

    def __init__(self, folder: Path, what: str, *parts: bytes | str) -> None:
        found = hashlib.sha256(f"{torch.__version__}\0{torch.get_num_threads()}".encode())
        for part in parts:
            raw = part.encode() if isinstance(part, str) else part
            found.update(len(raw).to_bytes(8, "big") + raw)
        self.path = folder / f"{what}-{found.hexdigest()[:32]}.pt"
        self.notes: list[str] = []
        self._saved = time.monotonic()
        self._cost = 0.0

    def load(self) -> State | None:
        """Return the saved state; None if there is none or the file is damaged."""
        try:
            held = torch.load(self.path, weights_only=True)
            return State(**held)
        except FileNotFoundError:
            return None
        except Exception as error:  # noqa: BLE001 -- a damaged file may raise anything; training just begins anew
            self.notes.append(f"the checkpoint {self.path.name} cannot be read ({type(error).__name__}); begun anew")
            return None

    def offer(self, state: State) -> None:
        """Save the state, unless the last save was so recent that saving would take too much of the time."""
        if time.monotonic() - self._saved >= self._cost / _SHARE:
            self.save(state)

    def save(self, state: State) -> None:
        """Save the state atomically. A full disk is noted and does not stop the training."""
        began = time.monotonic()
        if state.finished:
            state = dataclasses.replace(state, parameters=state.best, optimizer=None)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.new_file(self.path) as file:
                torch.save({entry.name: getattr(state, entry.name) for entry in dataclasses.fields(state)}, file)
        except (OSError, RuntimeError) as error:  # torch turns some failures to write into RuntimeError
            note = f"no checkpoint could be written to {self.path.parent}: {error}"
            if note not in self.notes:
                self.notes.append(note)
        self._saved = time.monotonic()
        self._cost = self._saved - began
