"""Identifiers are in the field's words: ``make check`` refuses the ones that were retired."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

TREE = Path(__file__).parents[2]


def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_names", TREE / "tools" / "check_names.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_identifier_of_the_packages_holds_a_retired_word() -> None:
    assert list(checker().problems(TREE)) == []


def test_a_retired_word_is_found_in_every_place_where_a_name_is_given(tmp_path: Path) -> None:
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "retired_words.toml").write_bytes((TREE / "tools" / "retired_words.toml").read_bytes())
    folder = tmp_path / "host" / "kedge"
    folder.mkdir(parents=True)
    (folder / "front_door.py").write_text(
        "class HTTPDoor:\n    def ask(self, my_desk):\n        self.crew = 1\n"
        "        wishes = 2\n        return ask_doorman()\n"
    )
    found = "\n".join(checker().problems(tmp_path))
    for name in ("front_door", "HTTPDoor", "my_desk", "crew", "wishes"):
        assert f": {name}:" in found
    assert "doorman" not in found
