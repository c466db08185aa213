"""A decoder as torch computes it for distillation: the same as written out in float64, for every family."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import decoders

from kedge.importing.decoders import reading
from kedge.training.decoder.network import DecoderNetwork
from kedge.training.decoder.weights import HeldDecoder, held


def read(folder: Path, name: str) -> HeldDecoder:
    found = reading.read(decoders.folder(folder, name))
    return held(found.spec, found.weights, norm_bias=found.weights.has_bias("norm"))


@pytest.mark.parametrize("name", decoders.CONFIGURATIONS)
def test_it_answers_as_the_decoder_written_out(name: str, tmp_path: Path) -> None:
    decoder = read(tmp_path, name)
    tokens = np.random.default_rng(0).integers(0, decoder.spec.vocabulary, (2, 20))
    with torch.no_grad():
        network = DecoderNetwork(decoder)
        found = network(torch.from_numpy(tokens), attention=True)
        fused = network(torch.from_numpy(tokens))
    assert torch.allclose(found.logits, fused.logits, atol=1e-4)
    plain = decoders.PlainDecoder(decoder.spec, decoder.weights)
    for row, one in zip(tokens, found.logits.numpy(), strict=True):
        expected = plain.logits([int(token) for token in row])
        assert np.abs(one - expected).max() < 1e-5 * expected.std() + 1e-5
    assert len(found.hidden) == len(found.attention) == len(decoder.spec.layers)
    assert all(torch.allclose(maps.sum(-1), torch.ones(1)) for maps in found.attention)


def test_what_is_written_back_is_what_was_read(tmp_path: Path) -> None:
    decoder = read(tmp_path, "gpt2")
    again = DecoderNetwork(decoder).written()
    for index, layer in enumerate(decoder.weights.layers):
        assert list(again.weights.layer(index)) == list(layer)
        assert all(np.array_equal(again.weights.layer(index)[name], array) for name, array in layer.items())
    assert {*again.weights.outside} == {*decoder.weights.outside}
