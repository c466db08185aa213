"""The configuration of a bundle for text generation, in addition to the common configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class AnswerRules:
    """What the model's author wants of every answer.

    Attributes:
        suppressed: tokens that are never written; ``suppressed_first`` not as the first.
        no_repeat: the number of tokens in a row that do not occur twice; 0 for any.
        repetition_penalty: the default of the option of this name.
        least: the number of tokens before which no end token is written.
    """

    suppressed: tuple[int, ...] = ()
    suppressed_first: tuple[int, ...] = ()
    no_repeat: int = 0
    repetition_penalty: float = 1.0
    least: int = 0


@dataclass(frozen=True, kw_only=True)
class Speech:
    """How a model of speech (Whisper) hears a sound, and the tokens by which it is told what to write.

    Attributes:
        rate: samples a second.
        frame: the number of samples of a frame; ``hop`` those from one frame to the next.
        mels: features of a frame.
        languages: token of each language (``en``); empty for a model of one language.
        transcribe, translate, no_timestamps, no_speech: tokens; None if there is none.
    """

    rate: int
    frame: int
    hop: int
    mels: int
    languages: dict[str, int] = field(default_factory=dict)
    transcribe: int | None = None
    translate: int | None = None
    no_timestamps: int | None = None
    no_speech: int | None = None


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the encoder of an encoder-decoder reads.

    Attributes:
        positions: the largest number of the encoder's positions.
        position_bytes: the bytes that a slot keeps for one of them.
        begin_tokens: the beginning of every answer, which is given.
        end_token: token put after a text; None for none.
        prefixes: text put before a text, by task.
        speech: for a model that hears; None for one that reads.
    """

    positions: int
    position_bytes: int
    begin_tokens: tuple[int, ...]
    end_token: int | None = None
    prefixes: dict[str, str] = field(default_factory=dict)
    speech: Speech | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """The layers that a bundle holds of a decoder whose layers are split over devices.

    Attributes:
        index: which part it is, from 0 on, of ``count``. The first also holds embedding, head and text side.
        layers: its first layer, and the one after its last.
        channels: of the hidden states between the parts.
        following: digest of the bundle with the layers after these; None for the last part.
        whole: the title of the golden vectors of all parts together; None for parts after the first.
    """

    index: int
    count: int
    layers: tuple[int, int]
    channels: int
    following: str | None = None
    whole: str | None = None

    @property
    def words(self) -> str:
        """What it holds, for a person."""
        return f"part {self.index + 1} of {self.count} (layers {self.layers[0]} to {self.layers[1] - 1})"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A decoder language model.

    Attributes:
        architecture: the family (``llama``).
        context: the number of positions of one sequence, prompt and answer together.
        slots: the number of concurrent sequences assumed in ``resources.memory_bytes``.
        vocabulary: the number of tokens.
        position_bytes: the size of the caches for one position of one slot, in bytes.
        window_bytes: the size of a slot's caches that do not grow with the context, in bytes.
        tokenizer: the title of the file ``tokenizer.json``; empty for a part that writes no text.
        template: the title of the chat template (Jinja); None for a model that only continues a text.
        begin_token: the token put before a plain text; None if there is none.
        end_tokens: any of these ends an answer.
        special: the template's variables ``bos_token``, ``eos_token``, ….
        source: what an encoder reads before the decoder writes; None for a decoder alone.
        rules: what holds for every answer.
        part: the layers that the bundle holds; None for all.
    """

    architecture: str
    context: int
    slots: int
    vocabulary: int
    position_bytes: int
    tokenizer: str
    window_bytes: int = 0
    template: str | None = None
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    special: dict[str, str] = field(default_factory=dict)
    source: Source | None = None
    rules: AnswerRules = field(default_factory=AnswerRules)
    part: Part | None = None

    @property
    def writes(self) -> bool:
        """Whether the bundle writes text; parts after the first only compute their layers."""
        return self.part is None or self.part.index == 0

    @property
    def cache_bytes(self) -> int:
        """The size of the caches of all slots, in bytes."""
        fixed = 0 if self.source is None else self.source.positions * self.source.position_bytes
        return self.slots * (self.context * self.position_bytes + self.window_bytes + fixed)
