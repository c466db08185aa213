"""onnxruntime-genai. usage: ort_genai.py FOLDER THREADS CONTEXT"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai
from decoder_peer import serve


class OrtGenai:
    """A generator that is rewound, as its documentation does it for chats."""

    def __init__(self, folder: Path, threads: int, context: int) -> None:
        path = folder / "genai_config.json"
        settings = json.loads(path.read_text())
        settings["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = threads
        path.write_text(json.dumps(settings))
        self._model = onnxruntime_genai.Model(str(folder))
        how = onnxruntime_genai.GeneratorParams(self._model)
        # With the smallest length at the largest no end token ends an answer.
        how.set_search_options(do_sample=False, max_length=context, min_length=context)
        self._generator = onnxruntime_genai.Generator(self._model, how)

    def read(self, prompt: Sequence[int]) -> None:
        """See :class:`decoder_peer.Peer`."""
        self._generator.rewind_to(0)
        self._generator.append_tokens(np.array([prompt], np.int32))
        self._generator.generate_next_token()

    def write(self, prompt: Sequence[int], count: int) -> int:
        """See :class:`decoder_peer.Peer`."""
        self._generator.rewind_to(len(prompt) - 1)
        self._generator.append_tokens(np.array([prompt[-1:]], np.int32))
        for _ in range(count):
            self._generator.generate_next_token()
        return len(self._generator.get_sequence(0)) - len(prompt)


serve(OrtGenai(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
