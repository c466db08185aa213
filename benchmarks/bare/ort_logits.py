"""Logits of all positions by files of onnxruntime-genai's builder. usage: ort_logits.py FOLDER TOKENS.npy OUT.npy"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

folder, tokens, out = map(Path, sys.argv[1:])
decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
settings = onnxruntime.SessionOptions()
settings.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(str(folder / "model.onnx"), settings, providers=["CPUExecutionProvider"])
past = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
found = []
for sequence in np.load(tokens):
    feeds = {one.name: past for one in session.get_inputs() if one.name.startswith("past")}
    given = {
        "input_ids": sequence[None],
        "attention_mask": np.ones((1, len(sequence)), np.int64),
        "position_ids": np.arange(len(sequence))[None],
    }
    feeds |= {name: value for name, value in given.items() if name in {one.name for one in session.get_inputs()}}
    found.append(session.run(["logits"], feeds)[0][0])
np.save(out, np.stack(found))
