"""The configuration of a bundle for text generation, beside the common configuration."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A decoder language model.

    Attributes:
        architecture: the family (``llama``).
        context: positions of one sequence, prompt and answer together.
        slots: sequences at once that ``resources.memory_bytes`` counts.
        vocabulary: tokens that there are.
        position_bytes: of the caches, for one position of one slot.
        tokenizer: title of the file ``tokenizer.json``.
        template: title of the chat template (Jinja); None for a model that only goes on with a text.
        begin_token: put before a plain text; None where there is none.
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
        """Bytes of the caches of all slots."""
        return self.slots * self.context * self.position_bytes
