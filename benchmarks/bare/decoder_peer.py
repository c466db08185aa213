"""What the peers of ``benchmarks.generation_peers`` have in common: a process that answers one JSON line by another."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Protocol


class Peer(Protocol):
    """A loaded model."""

    def read(self, prompt: Sequence[int]) -> None:
        """Read a prompt that nothing is cached of, and write one token."""

    def write(self, prompt: Sequence[int], count: int) -> int:
        """Write so many tokens after the prompt that was read last, whose last token alone is read anew, and return
        how many were written."""


def serve(peer: Peer) -> None:
    """Answer until standard input ends: seconds by the processor and by the clock."""
    # What libraries print goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        written = 0
        cpu, wall = time.process_time(), time.perf_counter()
        if asked["count"]:
            written = peer.write(asked["prompt"], asked["count"])
        else:
            peer.read(asked["prompt"])
        taken = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps({**taken, "written": written}), file=answers, flush=True)
