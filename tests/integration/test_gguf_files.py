"""A GGUF file is the model of the folder that holds the same numbers, to the precision of its storage type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import decoders, gguf_files

from kedge.importing.decoders import reading
from kedge_protocol.errors import ModelError

pytestmark = pytest.mark.packages("gguf")

_TOKENS = [3, 9, 44, 50, 7, 31, 8, 20, 61, 12]
_WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "num_key_value_heads": 4}
_GEMMA = {"num_hidden_layers": 7, "query_pre_attn_scalar": 16, "layer_types": None, "rope_local_base_freq": 10000.0}
_LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}}


def _apart(path: Path) -> float:
    """The largest difference of the logits of file and folder, relative to their spread."""
    file, folder = reading.read(path), reading.read(path.with_suffix(".folder"))
    one, other = (decoders.PlainDecoder(read.spec, read.weights).logits(_TOKENS) for read in (file, folder))
    return float(np.abs(one - other).max() / other.std())


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("llama", {}),
        ("llama", _LINEAR),
        ("llama3", {}),
        ("mistral", {"sliding_window": None, "head_dim": 16}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3", _GEMMA),
    ],
)
def test_a_file_of_a_family_is_the_model_of_its_folder(name: str, changed: dict[str, Any], tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", name, changed=changed)
    assert _apart(path) < 1e-5


@pytest.mark.parametrize(
    "kind",
    ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"],
)
def test_every_storage_type_is_read_as_the_numbers_it_stands_for(kind: str, tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", "llama", kind=kind, changed=_WIDE)
    assert _apart(path) < 1e-5


def test_a_file_that_is_cut_short_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "model.gguf", "llama")
    whole = path.read_bytes()
    for size in (len(whole) - 4096, 2000, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"GGUF|tensor|vocabulary|key"):
            decoders.PlainDecoder(*(lambda read: (read.spec, read.weights))(reading.read(path))).logits(_TOKENS)
