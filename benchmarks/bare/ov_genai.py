"""openvino-genai. usage: ov_genai.py FOLDER THREADS CONTEXT"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import openvino
import openvino_genai
from decoder_peer import serve


class OvGenai:
    """A pipeline as it is made by default, whose cache of prefixes keeps the prompt; in float32, as Kedge computes."""

    def __init__(self, folder: str, threads: int) -> None:
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
        self._pipeline = openvino_genai.LLMPipeline(folder, "CPU", **properties)

    def read(self, prompt: Sequence[int]) -> None:
        """See :class:`decoder_peer.Peer`."""
        self.write(prompt, 1)

    def write(self, prompt: Sequence[int], count: int) -> int:
        """See :class:`decoder_peer.Peer`."""
        tokens = np.array([prompt], np.int64)
        how = openvino_genai.GenerationConfig()
        how.max_new_tokens, how.ignore_eos = count, True
        given = openvino_genai.TokenizedInputs(openvino.Tensor(tokens), openvino.Tensor(np.ones_like(tokens)))
        return len(self._pipeline.generate(given, how).tokens[0])


serve(OvGenai(sys.argv[1], int(sys.argv[2])))
