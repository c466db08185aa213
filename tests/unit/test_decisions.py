"""Decisions say what they are, and the index says the same."""

from __future__ import annotations

import re

from tests.conftest import ROOT

DECISIONS = ROOT / "docs" / "decisions"
_HEAD = re.compile(
    r"# (?P<number>\d{3}): (?P<title>.+)\n\n"
    r"\*\*Status:\*\* (?P<status>[^.]+)\. \*\*Date:\*\* (?P<date>\d{4}-\d\d-\d\d)\.\n"
)
_ROW = re.compile(r"^\| \[(\d{3}): (.+)\]\(([^)]+)\) \| (\S+) \| (.+) \|$", re.MULTILINE)


def test_each_decision_has_a_status_a_date_and_the_options_considered() -> None:
    lacking = []
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        text = path.read_text(encoding="utf-8")
        head = _HEAD.match(text)
        if head is None or head["number"] != path.name[:3] or "**Options considered" not in text:
            lacking.append(path.name)
    assert not lacking, "title, status, date, options considered: see docs/decisions/README.md"


def test_the_index_has_a_row_for_each_decision_that_says_the_same() -> None:
    heads = {}
    for path in sorted(DECISIONS.glob("[0-9]*.md")):
        head = _HEAD.match(path.read_text(encoding="utf-8"))
        assert head is not None, path.name
        heads[path.name] = (head["number"], head["title"], head["date"], head["status"])
    rows = _ROW.findall((DECISIONS / "README.md").read_text(encoding="utf-8"))
    assert {name: (number, title, date, status) for number, title, name, date, status in rows} == heads
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
