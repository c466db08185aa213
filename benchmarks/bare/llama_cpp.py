"""llama.cpp by the package xllamacpp. usage: llama_cpp.py GGUF THREADS CONTEXT"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import xllamacpp
from decoder_peer import serve


class LlamaCpp:
    """Its own server, called in the process."""

    def __init__(self, path: str, threads: int, context: int) -> None:
        how = xllamacpp.CommonParams()
        how.model.path = path
        how.n_ctx, how.n_parallel = context, 1
        how.cpuparams.n_threads = how.cpuparams_batch.n_threads = threads
        how.warmup, how.verbosity = False, 0
        self._server = xllamacpp.Server(how)

    def read(self, prompt: Sequence[int]) -> None:
        """See :class:`decoder_peer.Peer`."""
        self._asked(prompt, 1, cached=False)

    def write(self, prompt: Sequence[int], count: int) -> int:
        """See :class:`decoder_peer.Peer`."""
        found: int = self._asked(prompt, count, cached=True)["usage"]["completion_tokens"]
        return found

    def _asked(self, prompt: Sequence[int], count: int, *, cached: bool) -> dict[str, Any]:
        options = {"temperature": 0, "top_k": 1, "ignore_eos": True, "cache_prompt": cached}
        found = self._server.handle_completions({"prompt": list(prompt), "n_predict": count, **options})
        answer = json.loads(found) if isinstance(found, (str, bytes)) else found
        one: dict[str, Any] = answer[0] if isinstance(answer, list) else answer
        if "usage" not in one:
            raise RuntimeError(str(one))
        return one


serve(LlamaCpp(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
