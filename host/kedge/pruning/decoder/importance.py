"""Ranks what a decoder can lose: units and heads by their weights or by gradients, layers by what the loss really is
without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.nn import functional

from kedge.pruning.importance import Importance
from kedge.training.decoder.network import DecoderNetwork
from kedge.training.decoder.weights import HeldDecoder
from kedge_targets.decoder.spec import Array

Heard = Callable[[int, int], None]
Sequences = Sequence[Sequence[int]]


def of_width(decoder: HeldDecoder, sequences: Sequences, by: Importance, *, seed: int, heard: Heard) -> list[Array]:
    """Return the score of each layer's inner units, float64 [intermediate]."""
    return _scores(decoder, sequences, "down", decoder.spec.intermediate, by, seed=seed, heard=heard)


def of_heads(decoder: HeldDecoder, sequences: Sequences, by: Importance, *, seed: int, heard: Heard) -> list[Array]:
    """Return the score of each layer's key-value heads with the queries that read them, float64 [kv heads]."""
    return _scores(decoder, sequences, "o", decoder.spec.kv_heads, by, seed=seed, heard=heard)


def _scores(
    decoder: HeldDecoder,
    sequences: Sequences,
    name: str,
    count: int,
    by: Importance,
    *,
    seed: int,
    heard: Heard,
) -> list[Array]:
    """Score groups of neighbouring columns of one matrix of each layer."""
    layers = len(decoder.spec.layers)
    if by is Importance.RANDOM:
        random = np.random.default_rng(seed)
        return [random.random(count) for _ in range(layers)]
    if by is Importance.MAGNITUDE:
        matrices = [decoder.weights.layer(index)[name] for index in range(layers)]
        return [np.square(one.reshape(len(one), count, -1)).sum(axis=(0, 2)).astype(np.float64) for one in matrices]
    return _taylor(decoder, sequences, name, count, heard)


def _taylor(decoder: HeldDecoder, sequences: Sequences, name: str, count: int, heard: Heard) -> list[Array]:
    """Return the squared first-order change of the next token's cross entropy without a group, summed over the
    sequences (Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019)."""
    network = DecoderNetwork(decoder)
    matrices = [layer[name] for layer in network.layers]
    found = [np.zeros(count) for _ in matrices]
    for at, sequence in enumerate(sequences):
        heard(at, len(sequences))
        tokens = torch.tensor([list(sequence)])
        logits = network(tokens).logits[0, :-1]
        loss = functional.cross_entropy(logits, tokens[0, 1:])
        for total, matrix, slope in zip(found, matrices, torch.autograd.grad(loss, matrices), strict=True):
            change = (matrix.detach() * slope).reshape(len(matrix), count, -1).sum(dim=(0, 2))
            total += change.double().numpy() ** 2
    return found


def least_important_layers(decoder: HeldDecoder, sequences: Sequences, count: int, heard: Heard) -> list[int]:
    """Return the layers whose absence changes the answers least, found one after the other: each time the layer goes
    without which the distribution of the next token diverges least from the whole decoder's.

    Args:
        count: how many go, fewer than there are.
    """
    left, gone = list(range(len(decoder.spec.layers))), list[int]()
    network = DecoderNetwork(decoder)
    tokens = torch.tensor([list(one) for one in sequences])
    tries, done = sum(len(left) - number for number in range(count)), 0
    with torch.no_grad():
        whole = functional.log_softmax(network(tokens).logits, dim=-1)
        for _ in range(count):
            losses = []
            for index in left:
                heard(done, tries)
                done += 1
                without = functional.log_softmax(network(tokens, without=(*gone, index)).logits, dim=-1)
                losses.append(float(functional.kl_div(without, whole, reduction="batchmean", log_target=True)))
            gone.append(left.pop(int(np.argmin(losses))))
    return sorted(gone)


def most_important(scores: Sequence[Array], count: int) -> list[Array]:
    """Return the ``count`` highest of each layer, in their order."""
    return [np.sort(np.argsort(-one, kind="stable")[:count]) for one in scores]
