"""A float decoder, computed layer by layer with only one layer's weights in memory."""

from __future__ import annotations

from dataclasses import dataclass

from kedge.evaluation.decoders import reference as references
from kedge.evaluation.decoders.reference import Reference
from kedge.importing.decoders.decoder import Decoder
from kedge.quantization.decoder_layers import LayerSource
from kedge_targets.decoder.contract import DecoderCompiler
from kedge_targets.decoder.spec import Array
from kedge_targets.worker import Progress


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """A decoder with the compiler that lays its layers out and runs them.

    Attributes:
        context: positions that a runner of its layers has room for.
    """

    decoder: Decoder
    compiler: DecoderCompiler
    context: int
    progress: Progress

    @property
    def layers(self) -> LayerSource:
        """Return the layers."""
        return LayerSource(self.decoder.spec, self.decoder.weights, self.compiler, self.context)

    @property
    def norm(self) -> dict[str, Array]:
        """Return the tensors of the last norm."""
        weights = self.decoder.weights
        names = ["norm", *(["norm.bias"] if weights.has_bias("norm") else [])]
        return {name: weights.outer(name) for name in names}

    @property
    def head(self) -> Array:
        """Return the head's weight, float32 [vocabulary, channels]."""
        return self.decoder.weights.outer("embedding" if self.decoder.spec.tied else "head")

    def embedded(self, sequences: list[list[int]]) -> list[Array]:
        """Return the first layer's inputs for sequences of tokens, float32 [positions, channels] each."""
        spec, weights = self.decoder.spec, self.decoder.weights
        positions = weights.outer("positions") if spec.learned_positions else None
        return references.embedded(spec, weights.outer("embedding"), positions, sequences)

    def before_head(self, sequences: list[list[int]], what: str) -> list[Array]:
        """Return the head's inputs for sequences of tokens, float32 [positions, channels] each.

        Args:
            what: is done, for the progress.
        """
        source = self.layers
        hidden = references.through(
            self.embedded(sequences),
            len(self.decoder.spec.layers),
            lambda index: source.runner(index, source.piece(index)),
            lambda done, total: self.progress(what, done, total),
        )
        norm = self.norm
        return [references.normalized(self.decoder.spec, norm, one) for one in hidden]

    def answers(self, sequences: list[list[int]]) -> Reference:
        """Return its answers to sequences of tokens."""
        hidden = self.before_head(sequences, "float reference")
        return Reference(sequences=sequences, hidden=hidden, head=self.head)
