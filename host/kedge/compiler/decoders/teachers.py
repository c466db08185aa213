"""A step may name a teacher: another language model with the same tokens, which the user's learns from and which judges
instead of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kedge.importing.decoders import reading
from kedge.importing.decoders.decoder import Decoder
from kedge.search.candidate import StepChoice, named_teacher
from kedge_protocol.errors import ModelError


def named(steps: Sequence[StepChoice]) -> Path | None:
    """Return the teacher that steps name, as an absolute path.

    Raises:
        ConfigError: they name several.
        ModelError: it is no language model.
    """
    given = named_teacher(steps, where="--step")
    if given is None:
        return None
    path = Path(given)
    what = "" if path.exists() else "there is no such file or folder"
    if not what and (path.suffix == ".onnx" or not reading.is_decoder(path) or reading.has_encoder(path)):
        what = "is no language model that can be trained towards"
    if what:
        raise ModelError(what, where=f"teacher {path}", remedy="Give a Hugging Face folder, or a .gguf file")
    return path.absolute()


def read(path: Path, student: Decoder) -> Decoder:
    """Read a teacher.

    Raises:
        ModelError: it cannot be read, or has other tokens than the student.
    """
    teacher = reading.read(path)
    if teacher.spec.vocabulary != student.spec.vocabulary or _tokens(teacher) != _tokens(student):
        raise ModelError(
            f"has other tokens ({teacher.spec.vocabulary}) than the model ({student.spec.vocabulary})",
            where=f"teacher {path}",
            remedy="Give a model of the same family",
        )
    return teacher


def _tokens(decoder: Decoder) -> dict[str, int]:
    from kedge.evaluation.decoders import texts

    found: dict[str, int] = texts.tokenizer(decoder.text.tokenizer, where="tokenizer.json").get_vocab()
    return found
