"""Opens a ``tokenizer.json`` for a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def opened(source: Path | bytes) -> Any:
    """Return a tokenizer that encodes whole texts.

    A folder that was saved after training often keeps the length that its texts were cut off or filled up to then. As
    in transformers, neither holds for a text: the end of a prompt would be lost without a word.

    Args:
        source: the file, or its content.

    Raises:
        ImportError: ``tokenizers`` is not installed.
        Exception: the library refuses the file; it raises nothing narrower.
    """
    from tokenizers import Tokenizer

    found = Tokenizer.from_file(str(source)) if isinstance(source, Path) else Tokenizer.from_str(source.decode())
    found.no_truncation()
    found.no_padding()
    return found
