"""The configuration of a bundle for text generation, in addition to the common configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A decoder language model.

    Attributes:
        architecture: the family (``llama``).
        context: the number of positions of one sequence, prompt and answer together.
        slots: the number of concurrent sequences assumed in ``resources.memory_bytes``.
        vocabulary: the number of tokens.
        position_bytes: the size of the caches for one position of one slot, in bytes.
        tokenizer: the title of the file ``tokenizer.json``.
        template: the title of the chat template (Jinja); None for a model that only continues a text.
        begin_token: the token put before a plain text; None if there is none.
        end_tokens: any of these ends an answer.
        special: the template's variables ``bos_token``, ``eos_token``, ….
    """

    architecture: str
    context: int
    slots: int
    vocabulary: int
    position_bytes: int
    tokenizer: str
    template: str | None = None
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()
    special: dict[str, str] = field(default_factory=dict)

    @property
    def cache_bytes(self) -> int:
        """The size of the caches of all slots, in bytes."""
        return self.slots * self.context * self.position_bytes
