"""Answers of a language model that match a JSON schema, a regular expression or a grammar."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tests.support import decoders, drawn_schemas

from kedge_agent import Model
from kedge_protocol.errors import InputError, MissingDependencyError

ASK = "Tell me: "


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of single letters: it never writes what matches by itself."""
    return decoders.writer(tmp_path_factory.mktemp("structured"), slots=4)


@pytest.fixture(scope="module")
def model(release: Path) -> Iterator[Model]:
    with Model(release, target="generic-cpu") as found:
        yield found


def _check(model: Model, schemas: int, answers: int) -> None:
    random = np.random.default_rng(17)
    for number in range(schemas):
        schema = drawn_schemas.draw(random)
        streams = [
            model.generate(ASK, stream=True, json_schema=schema, temperature=1.0, seed=at, max_tokens=450)
            for at in range(answers)
        ]
        for stream in streams:
            found = stream.finish()
            assert found.reason == "stop", (number, schema, found.text)
            jsonschema_rs.validate(schema, json.loads(found.text))


def test_answers_to_drawn_schemas_are_valid(model: Model) -> None:
    _check(model, schemas=15, answers=4)


@pytest.mark.campaign
def test_a_thousand_answers_to_a_hundred_schemas_are_valid(model: Model) -> None:
    _check(model, schemas=100, answers=10)


def test_a_greedy_answer_is_constrained_too_and_goes_on_by_what_the_model_likes(model: Model) -> None:
    schema = {"enum": ["left", "right"]}
    found = model.generate(ASK, json_schema=schema)
    assert json.loads(found.text) in ("left", "right")
    first = model.generate(ASK, regex="[lr]", log_probabilities=96).log_probabilities[0]
    likelihood = dict(first.top)
    ids = {letter: model.loaded().generator.tokenizer.token_to_id(letter) for letter in "lr"}
    assert first.id == max(ids.values(), key=lambda token: likelihood[token])


def test_a_regular_expression_and_a_grammar_are_matched_as_a_whole(model: Model) -> None:
    for seed in range(5):
        options: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 200}
        assert re.fullmatch("[0-9]{2}:[0-5][0-9]", model.generate(ASK, regex="[0-9]{2}:[0-5][0-9]", **options).text)
        text = model.generate(ASK, grammar='start: item ("," item){2}\nitem: "ab" | "cd"', **options).text
        assert re.fullmatch("(ab|cd)(,(ab|cd)){2}", text)


def test_constrained_and_free_answers_run_at_once_as_they_do_alone(model: Model) -> None:
    calls: list[dict[str, Any]] = [{"json_schema": True}, {}, {"regex": "[a-c]{12}"}, {}]
    rest: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 12}
    alone = [model.generate(ASK, **call, **rest).tokens for call in calls]
    streams = [model.generate(ASK, stream=True, **call, **rest) for call in calls]
    assert [stream.finish().tokens for stream in streams] == alone


def test_an_answer_that_is_cut_says_so(model: Model) -> None:
    assert model.generate(ASK, regex="[a-z]{100}", max_tokens=5).reason == "length"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"json_schema": {"type": "nonsense"}}, r"json_schema.*nonsense"),
        ({"json_schema": {"$ref": "http://127.0.0.1:9/schema"}}, "json_schema"),
        ({"json_schema": "text"}, "a JSON schema, as a mapping"),
        ({"json_schema": {"enum": [object()]}}, "not JSON"),
        ({"regex": "[a-z"}, "regex"),
        ({"grammar": "start: missing"}, "grammar"),
        ({"grammar": "x" * 200_000}, "more than"),
        ({"regex": "a", "json_schema": True}, "exclude each other"),
        ({"regex": "a", "ignore_end": True}, "ends where the constraint is met"),
    ],
)
def test_a_constraint_that_cannot_be_followed_is_an_error_at_once(model: Model, options: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        model.generate(ASK, **options)
    assert model.generate(ASK, regex="ok").text == "ok"


def test_what_the_vocabulary_cannot_write_is_an_error_and_others_go_on(model: Model) -> None:
    other = model.generate(ASK, stream=True, max_tokens=20, ignore_end=True)
    with pytest.raises(InputError, match="cannot be met"):
        model.generate(ASK, json_schema={"const": "é"})
    assert len(other.finish().tokens) == 20


def test_without_llguidance_the_extra_is_named(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with Model(release, target="generic-cpu") as fresh:
        with pytest.raises(MissingDependencyError, match=r"kedge-agent\[structured\]"):
            fresh.generate(ASK, json_schema=True)
        assert fresh.generate(ASK, max_tokens=1, ignore_end=True).tokens
