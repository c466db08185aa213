"""What early exit by confidence would save in a decoder, without building it: ``python -m benchmarks.early_exit MODEL
CALIBRATION EVALUATION``.

After some of the layers a head of its own gives logits: the model's norm, an affine map fitted by ridge regression from
the hidden state here to the last one, the model's head. A token exits where the largest probability is above a
threshold, the smallest one for which the calibration texts still get the whole model's token at 99 of 100 positions.
What is saved is counted in weights that a token reads, which is what a decoding step costs: a token that exits still
needs the keys and values of the layers that it leaves out, one that stays has paid for the extra head.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kedge.evaluation.decoders import reference as references
from kedge.evaluation.decoders import texts
from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_layers import LayerSource
from kedge_targets import registry

Array = npt.NDArray[np.float32]

SEQUENCES, LENGTH = 10, 256
AGREEMENT = 0.99
DEPTHS = (0.4, 0.6, 0.75, 0.87)
"""Shares of the layers after which a token may exit."""


def hidden_states(decoder: Decoder, sequences: list[list[int]], after: set[int]) -> dict[int, Array]:
    """Return the normalized hidden states after some numbers of layers, [positions of all sequences, channels]."""
    spec, weights = decoder.spec, decoder.weights
    compiler = registry.compiler("onnxruntime").decoders()
    if compiler is None:
        raise RuntimeError("ONNX Runtime's compiler for decoders is not there")
    source = LayerSource(spec, weights, compiler, LENGTH)
    hidden = references.embedded(spec, weights.outer("embedding"), None, sequences)
    found = {}
    for index in range(len(spec.layers)):
        runner = source.runner(index, source.piece(index))
        hidden = [runner.run(one)[0] for one in hidden]
        if index + 1 in after:
            norm = {"norm": weights.outer("norm")}
            found[index + 1] = np.concatenate([references.normalized(spec, norm, one) for one in hidden])
        print(f"layer {index + 1} of {len(spec.layers)}", file=sys.stderr)
    return found


def fitted(inputs: Array, wanted: Array) -> Array:
    """Return an affine map by ridge regression, [channels + 1, channels]."""
    x = np.concatenate([inputs, np.ones((len(inputs), 1), np.float32)], axis=1).astype(np.float64)
    gram = x.T @ x
    gram += np.eye(len(gram)) * 1e-3 * np.trace(gram) / len(gram)
    found: Array = np.linalg.solve(gram, x.T @ wanted).astype(np.float32)
    return found


def tops(hidden: Array, head: Array) -> tuple[npt.NDArray[np.int64], Array]:
    """Return the most likely token of each position, and its probability."""
    tokens, shares = [], []
    for first in range(0, len(hidden), 128):
        logits = hidden[first : first + 128] @ head.T
        top = logits.argmax(-1)
        most = logits.max(-1, keepdims=True)
        tokens.append(top)
        shares.append(1 / np.exp(logits - most).sum(-1))
    return np.concatenate(tokens), np.concatenate(shares)


def threshold(agrees: npt.NDArray[np.bool_], shares: Array) -> float:
    """Return the smallest probability above which exits keep the agreement over all positions."""
    order = np.argsort(-shares)
    wrong = np.cumsum(~agrees[order])
    allowed = np.flatnonzero(wrong <= (1 - AGREEMENT) * len(agrees))
    return float(shares[order][allowed[-1]]) if len(allowed) else 2.0


def main(model: str, calibration: str, evaluation: str) -> None:
    """Print a line for each depth."""
    decoder = reading.read(Path(model))
    spec, count = decoder.spec, len(decoder.spec.layers)
    tokenizer = texts.tokenizer(decoder.text.tokenizer, where=model)
    begin = decoder.text.begin_token
    sequences = [
        texts.sequences(texts.read(Path(one))[0], tokenizer, length=LENGTH, wanted=SEQUENCES, begin=begin, where=one)
        for one in (calibration, evaluation)
    ]
    depths = sorted({max(1, round(share * count)) for share in DEPTHS} - {count})
    learned, judged = (hidden_states(decoder, one, {*depths, count}) for one in sequences)
    head = decoder.weights.outer("embedding" if spec.tied else "head")
    truth = [tops(states[count], head)[0] for states in (learned, judged)]
    attention = 2 * spec.hidden * spec.head_size * (spec.heads + spec.kv_heads)
    layer = attention + spec.hidden * spec.intermediate * (3 if spec.gated else 2)
    keys_values = 2 * spec.hidden * spec.head_size * spec.kv_heads
    whole = count * layer + head.size
    for depth in depths:
        mapped = fitted(learned[depth], learned[count])
        found = [tops(states[depth] @ mapped[:-1] + mapped[-1], head) for states in (learned, judged)]
        least = threshold(found[0][0] == truth[0], found[0][1])
        exits = found[1][1] >= least
        agreement = 1 - float((exits & (found[1][0] != truth[1])).mean())
        check = head.size + spec.hidden**2
        left = count - depth
        saved = float(exits.mean()) * (left * (layer - keys_values) + head.size) - check
        free = float(exits.mean()) * left * (layer - keys_values)
        print(
            f"after {depth} of {count} layers: {exits.mean():.3f} exit, same top token {agreement:.4f}, "
            f"weights saved {saved / whole:+.3f} (with a check that costs nothing {free / whole:+.3f})"
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
