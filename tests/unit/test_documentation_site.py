"""The documentation: links lead somewhere, every page is in the navigation, generated pages hold what the code has."""

from __future__ import annotations

import dataclasses
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomllib
import yaml
from tests.conftest import ROOT
from tests.support.documents import pages

from kedge_protocol import messages
from kedge_protocol.bundle.config import Verified

sys.path.insert(0, str(ROOT / "tools" / "site"))

import tables

_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s:]*)(#[^)\s]*)?\)")
_FENCED = re.compile(r"^( *)```.*?^\1```", re.MULTILINE | re.DOTALL)


def site() -> dict[str, object]:
    """``mkdocs.yml``."""
    found: dict[str, object] = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return found


def entries(nav: object) -> Iterator[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for inner in nav.values():
            yield from entries(inner)
    elif isinstance(nav, list):
        for inner in nav:
            yield from entries(inner)


@functools.cache
def generated() -> dict[str, str]:
    """Page → text of those that are made of the code."""
    public = tomllib.loads((ROOT / "tools" / "site" / "public_api.toml").read_text(encoding="utf-8"))
    return {
        "reference/cli.md": tables.commands(),
        "reference/protocol.md": tables.protocol(),
        "reference/files.md": tables.files(),
        **tables.api(public),
    }


@functools.cache
def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    text = _FENCED.sub("", page.read_text(encoding="utf-8"))
    found = set()
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-"))
    return found


def test_a_link_leads_to_a_file_and_its_heading() -> None:
    broken = []
    for page in pages():
        for target, anchor in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
            place = (page.parent / target).resolve() if target else page
            made = place.is_relative_to(ROOT / "docs") and str(place.relative_to(ROOT / "docs")) in generated()
            if made:
                continue
            if not place.exists() or (anchor and place.suffix == ".md" and anchor[1:] not in anchors(place)):
                broken.append(f"{page.relative_to(ROOT)}: {target}{anchor}")
    assert not broken, "\n".join(broken)


def test_a_module_or_file_that_a_page_names_is_there() -> None:
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    there = [f"/{path}" for path in files.stdout.splitlines() if (ROOT / path).exists()]
    lost = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"`((?:kedge|kedge_agent|kedge_targets|kedge_protocol)(?:\.\w+)+)(?::\w+)?`", text):
            if not _resolves(name) and name not in ENTRY_POINTS:
                lost.append(f"{page.relative_to(ROOT)}: {name}")
        for name in re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|toml|sh|md))`", text):
            if not any(path.endswith(f"/{name}") for path in there) and not name.startswith(
                ("/", "./", "etc/", "OUT/")
            ):
                lost.append(f"{page.relative_to(ROOT)}: {name}")
    assert not lost, "\n".join(lost)


def test_the_map_of_the_architecture_names_modules_that_are_there() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## (\w+/kedge\w*)\n(.*?)(?=^## )", text, re.MULTILINE | re.DOTALL)
    assert [folder for folder, _ in sections] == [
        "protocol/kedge_protocol",
        "targets/kedge_targets",
        "host/kedge",
        "agent/kedge_agent",
    ]
    for folder, section in sections:
        named = {name for cell in re.findall(r"^\| (`[^|]+`) \|", section, re.MULTILINE) for name in cell.split(", ")}
        places = [ROOT / folder / name.strip("`").replace(".", "/") for name in named]
        assert [place for place in places if not place.is_dir() and not place.with_suffix(".py").is_file()] == []
        listed = {name.strip("`").partition(".")[0] for name in named}
        rooms = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")} - {"demo"}
        assert rooms <= listed


ENTRY_POINTS = {"kedge.steps", "kedge.backends"}


def _resolves(name: str) -> bool:
    """Whether a dotted name is a module of the tree, or a word of one (nothing heavy is imported for it)."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for folder in ("host", "agent", "targets", "protocol"):
            base = ROOT.joinpath(folder, *parts[:length])
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.is_file():
                    text = file.read_text(encoding="utf-8")
                    return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False


def test_every_page_stands_in_the_navigation_and_every_entry_is_a_page() -> None:
    docs = ROOT / "docs"
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.md") if path.parent.name != "decisions"}
    project = {"project/contributing.md", "project/security.md", "project/changelog.md"}
    named = set(entries(site()["nav"]))
    assert there | set(generated()) | project == named


def test_a_reader_s_browser_asks_no_other_host() -> None:
    theme = site()["theme"]
    assert isinstance(theme, dict)
    assert theme["font"] is False
    assert not {"extra_javascript", "extra_css"} & set(site())
    # Material's plugin "offline" takes a script from another host.
    assert "offline" not in site()["plugins"]  # type: ignore[operator]


def test_the_protocol_s_page_holds_every_message_with_every_field() -> None:
    page = tables.protocol()
    for cls in tables.defined(messages):
        section = page.partition(f"\n## {cls.__name__}\n")[2].partition("\n## ")[0]
        assert section, cls.__name__
        if dataclasses.is_dataclass(cls):
            assert all(f"| `{field.name}` |" in section for field in dataclasses.fields(cls)), cls.__name__


def test_every_heading_that_the_protocol_s_page_links_to_is_on_it() -> None:
    page = tables.protocol()
    headings = {heading.lower() for heading in re.findall(r"^#+ (.*)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([a-z]+)\)", page)) <= headings


def test_the_commands_page_says_what_help_says() -> None:
    page = tables.commands()
    assert "### kedge rollout start" in page
    assert "### kedge-agent run" in page
    assert "<code>--max-drop FLOAT</code>" in page
    assert "[default: 0.01]" in page


def test_an_entry_for_two_parameters_becomes_two() -> None:
    text = "Args:\n    low, high: of it,\n        in volts.\n    name: its name."
    assert tables.one_name_each(text).splitlines() == [
        "Args:",
        "    low: of it,",
        "        in volts.",
        "    high: of it,",
        "        in volts.",
        "    name: its name.",
    ]


@pytest.mark.campaign
def test_the_site_builds_without_a_warning() -> None:
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    fetched = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']?https?://", re.IGNORECASE)
    for page in (ROOT / "build" / "site").rglob("*.html"):
        assert not fetched.findall(page.read_text(encoding="utf-8")), page


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", *sorted(p.name for p in (ROOT / ".github").rglob("*.md"))]
)
def test_what_a_newcomer_must_read_is_short(name: str) -> None:
    (path,) = [path for path in (ROOT / name, *(ROOT / ".github").rglob(name)) if path.is_file()]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 30


def test_the_concepts_page_explains_each_proof() -> None:
    text = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8")
    table = text.partition("| `verified` | the host has |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {proof.value for proof in Verified}
