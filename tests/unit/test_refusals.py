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
        ("The model is not a valid Flatbuffer buffer", True),
        ("mmap of size 0 requested.The model allocation is null/empty", True),
        (
            "Didn't find op for builtin opcode 'CONV_2D' version '99'. An older version of this builtin might be "
            "supported. Are you using an old TFLite binary with a newer model?",
            True,
        ),
        (
            "unsupported scale value (0.000000) in channel 0 for INT8 tensor 4 in XNNPACK delegate. Node number 2 "
            "(TfLiteXNNPackDelegate) failed to prepare.",
            False,
        ),
        ("GRUSequence node with name 'GRUSequence.152' expects Constant for port 3", False),
    ],
)
def test_what_to_do_follows_the_runtimes_words(reason: str, damaged: bool) -> None:
    assert ("damaged" in refusal_remedies.remedy(reason)) is damaged
