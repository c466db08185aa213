"""Multiple-choice questions of the user's are answered by log-likelihood, and told with their spread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tests.support import decoders

import kedge
from kedge.evaluation.decoders import choices
from kedge.importing.decoders import reading
from kedge_protocol.errors import ConfigError, DatasetError

QUESTIONS = [
    {
        "question": f"{'What is it? ' * (1 + at % 3)}{at}",
        "choices": ["one", "some words", f"{at}{at}"],
        "answer": at % 3,
    }
    for at in range(12)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("questions")
    decoders.folder(path / "llama", "llama")
    decoders.folder(path / "gemma3", "gemma3")
    letters = np.random.default_rng(3).integers(0, 50, 2500)
    (path / "text.txt").write_text("".join(chr(40 + at) for at in letters))
    (path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    return path


def _compiled(
    place: Path, model: str, out: Path, *, quantize: str = "precision=float32", **options: object
) -> kedge.Release:
    return kedge.compile(
        place / model, name="writer", version="1.0", targets=["generic-cpu"], calibration=place / "text.txt",
        evaluation=place / "text.txt", quantize=quantize, max_perplexity="9x", out=out, **options,  # type: ignore[arg-type]
    )  # fmt: skip


@pytest.mark.parametrize("model", ["llama", "gemma3"])
def test_the_likeliest_choice_is_that_of_a_float64_decoder(place: Path, model: str, tmp_path: Path) -> None:
    found = _compiled(place, model, tmp_path / "out", choices=place / "questions.jsonl").generation
    assert found is not None
    figures = found.targets[0].choices
    decoder = reading.read(place / model)
    plain = decoders.PlainDecoder(decoder.spec, decoder.weights)
    from kedge.evaluation.decoders import texts

    tokenizer = texts.tokenizer(decoder.text.tokenizer, where=model)
    asked = choices.read(place / "questions.jsonl", tokenizer, begin=decoder.text.begin_token, longest=64)
    right = 0
    for question, written in zip(asked, QUESTIONS, strict=True):
        scores = []
        for row, text in zip(question.rows, written["choices"], strict=True):  # type: ignore[call-overload]
            begin = [] if decoder.text.begin_token is None else [decoder.text.begin_token]
            before = len(begin) + len(tokenizer.encode(f"{written['question']}", add_special_tokens=False).ids)
            whole = [*begin, *tokenizer.encode(f"{written['question']} {text}", add_special_tokens=False).ids]
            assert list(row) == whole
            logits = plain.logits(whole)
            every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            scores.append(sum(every[at - 1, whole[at]] for at in range(before, len(whole))))
        right += int(np.argmax(scores)) == written["answer"]
    assert figures is not None
    assert (figures.accuracy, figures.reference, figures.same) == (right / 12, right / 12, 1.0)
    assert (figures.questions, figures.difference_error) == (12, 0.0)
    assert figures.accuracy_error == pytest.approx(np.sqrt(figures.accuracy * (1 - figures.accuracy) / 11))


def test_the_difference_is_judged_question_by_question() -> None:
    questions = [choices.Question(rows=((1, 2), (1, 3)), lengths=(1, 1), answer=0)] * 8
    found = choices.figures(questions, [0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1])
    assert (found.accuracy, found.reference, found.same) == (5 / 8, 6 / 8, 7 / 8)
    # One of eight differs by one: far less than what each share by itself is unsure by.
    assert found.difference_error == pytest.approx(np.std([0, 0, 0, 0, 0, -1, 0, 0]) / np.sqrt(7))
    assert found.difference_error < found.accuracy_error
    assert found.said.startswith(
        "8 multiple-choice questions: 0.625 ± 0.183 right, the float model 0.750 (-0.125 ± 0.125)"
    )


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "holds no question"),
        ("what?", "is no JSON"),
        ('["a", "b"]', "has no question"),
        ('{"question": " ", "choices": ["a", "b"], "answer": 0}', "has no question"),
        ('{"question": "a", "choices": "ab", "answer": 0}', "has no list of choices"),
        ('{"question": "a", "choices": ["b"], "answer": 0}', "needs two choices or more, all different"),
        ('{"question": "a", "choices": ["b", "b"], "answer": 0}', "needs two choices or more, all different"),
        ('{"question": "a", "choices": ["b", "c"], "answer": 2}', "2 is none of its 2 choices"),
        ('{"question": "a", "choices": ["b", "c"], "answer": "d"}', "'d' is none of its 2 choices"),
        ('{"question": "a", "choices": ["b", "c"]}', "None is none of its 2 choices"),
        (json.dumps({"question": "a" * 90, "choices": ["b", "c"], "answer": 0}), "are more than the 64 of the context"),
    ],
)
def test_what_is_no_question_is_told_by_its_line(place: Path, line: str, reason: str, tmp_path: Path) -> None:
    good = json.dumps(QUESTIONS[0])
    (tmp_path / "q.jsonl").write_text(f"{good}\n\n{line}" if line else line)
    with pytest.raises(DatasetError, match=reason) as error:
        _compiled(place, "llama", tmp_path / "out", choices=tmp_path / "q.jsonl")
    assert str(error.value).startswith(f"{tmp_path / 'q.jsonl'}{':3' if line else ''}: ")
    assert not (tmp_path / "out").exists()


def test_a_choice_may_be_named_by_its_text_and_of_many_questions_some_are_asked(place: Path, tmp_path: Path) -> None:
    from kedge.evaluation.decoders import texts

    lines = [{"question": f"{at} is", "choices": ["a", "b"], "answer": "b"} for at in range(500)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    decoder = reading.read(place / "llama")
    tokenizer = texts.tokenizer(decoder.text.tokenizer, where="llama")
    found = choices.read(tmp_path / "q.jsonl", tokenizer, begin=1, longest=64)
    assert len(found) == choices.WANTED
    assert {one.answer for one in found} == {1}
    assert tokenizer.decode(found[0].rows[0], skip_special_tokens=True) == "0 is a"
    assert tokenizer.decode(found[-1].rows[0], skip_special_tokens=True) == "499 is a"


def test_questions_are_for_decoders_alone(tmp_path: Path, place: Path) -> None:
    (tmp_path / "small.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"--choices: is for language models only"):
        kedge.compile(
            tmp_path / "small.onnx", name="m", version="1", targets=["generic-cpu"], calibration=place,
            evaluation=place, out=tmp_path / "out", choices=place / "questions.jsonl",
        )  # fmt: skip
