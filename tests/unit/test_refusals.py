"""A file is called damaged only where it could not be read."""

from __future__ import annotations

import pytest

from kedge_targets import refusal_remedies


@pytest.mark.parametrize(
    ("reason", "damaged"),
    [
        ("Load model from model.onnx failed:Protobuf parsing failed.", True),
        ("Unsupported model IR version: 14, max supported IR version: 13", True),
        ("Node (Conv_y) Op (Conv) [ShapeInferenceError] Input tensor must have at least 3 dimensions", False),
        ("GRUSequence node with name 'GRUSequence.152' expects Constant for port 3", False),
    ],
)
def test_what_to_do_follows_the_runtimes_words(reason: str, damaged: bool) -> None:
    assert ("damaged" in refusal_remedies.remedy(reason)) is damaged
