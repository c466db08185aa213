"""Hooks of the documentation site: generated pages, and links from ``docs/`` to the files above it."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

import tomllib
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("host", "agent", "targets", "protocol", "tools/site")]

import tables  # noqa: E402 -- only now is it found

PROJECT = {
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "CHANGELOG.md": "project/changelog.md",
    "README.md": "index.md",
}
"""File at the root of the tree → its page."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s:]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Every decision stands in the navigation."""
    decisions = sorted(path.name for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md"))
    config.nav.append({"Decisions": ["decisions/README.md", *(f"decisions/{name}" for name in decisions)]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of the code, and those that lie at the root of the tree."""
    public = tomllib.loads((ROOT / "tools" / "site" / "public_api.toml").read_text(encoding="utf-8"))
    made = {
        "reference/cli.md": tables.commands(),
        "reference/protocol.md": tables.protocol(),
        "reference/files.md": tables.files(),
        **tables.api(public),
    }
    for name, page in PROJECT.items():
        if page.startswith("project/"):
            made[page] = _from_the_root((ROOT / name).read_text(encoding="utf-8"), page)
    for page, text in made.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files at the root lead to their pages; links to source become plain text."""
    here = posixpath.join("docs", posixpath.dirname(page.file.src_uri))

    def changed(link: re.Match[str]) -> str:
        text, place = link[1], posixpath.normpath(posixpath.join(here, link[2]))
        if place in PROJECT:
            target = posixpath.relpath(PROJECT[place], posixpath.dirname(page.file.src_uri) or ".")
            return f"[{text}]({target})"
        outside = not place.startswith("docs/") and place != "docs"
        return text if outside and (ROOT / place).exists() else link[0]

    return _LINK.sub(changed, markdown)


def _from_the_root(text: str, page: str) -> str:
    """A file at the root as a page: its links begin elsewhere."""

    def changed(link: re.Match[str]) -> str:
        place = posixpath.normpath(link[2])
        target = PROJECT.get(place, place.removeprefix("docs/"))
        if place not in PROJECT and not place.startswith("docs/"):
            return link[1]
        return f"[{link[1]}]({posixpath.relpath(target, posixpath.dirname(page))}{link[3] or ''})"

    return _LINK.sub(changed, text)
