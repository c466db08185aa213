"""No text of this tree tells anybody, or pip, to install the package of Kedge's bare name: it is a stranger's."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import ROOT

from kedge_protocol import packages
from kedge_protocol.packages import AGENT, HOST, pip_install

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BARE = "kedge"
# As a requirement anywhere: with extras, a version or an address behind it; not within a path or a longer word.
_REQUIREMENT = re.compile(rf"(?<![\w./:-]){BARE}(?=\[|(?:[=~!<>]=|===)|\s+@\s)", re.IGNORECASE)
# Commands that install, to their end, and what looks up a distribution by its name.
_COMMAND = re.compile(r"\b(?:install|download|wheel|add|uninstall|lock)\b([^\n`|;&]*)")
_INSTALLER = re.compile(r"\b(?:pip[x3]?|uv|poetry|conda|pdm)\b")
_LOOKUP = re.compile(rf"""(?:distribution|version|metadata|requires|files)\(\s*['"]{BARE}['"]""")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / name for name in listed.stdout.splitlines()]


def strangers(text: str, *, listing: bool = False) -> list[str]:
    """What would install, or look up, the bare name; ``listing``: each line is a requirement."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = [match.group() for match in (*_REQUIREMENT.finditer(joined), *_LOOKUP.finditer(joined))]
    for line in joined.splitlines():
        if listing and re.fullmatch(rf"{BARE}\s*(?:[;#].*)?", line.strip(), re.IGNORECASE):
            found.append(line)
        installer = _INSTALLER.search(line)
        for command in _COMMAND.finditer(line, installer.end()) if installer else ():
            words = re.split(r"[\s'\",)]+", command[1])
            found += [line for word in words if word.lower().partition("[")[0] == BARE]
    return found


def names_in(text: str) -> set[str]:
    """Distributions of Kedge that a text's requirements name."""
    return set(re.findall(r"\b(kedge[-_.][a-z]+)(?=\[)", text.lower()))


@pytest.mark.parametrize(
    "text",
    [
        f'pip install "{BARE}[compile]"',
        f"python -m pip install --quiet {BARE}",
        f"remedy='Install it: pip install {BARE}'",
        f"pip install -c constraints/device.txt \\\n    {BARE}",
        f"pip download {BARE}",
        f"uv pip install '{BARE}'",
        f"host = ['{BARE}[compile,fleet]']",
        f'dependencies = ["{BARE}>=0.1"]',
        f"{BARE}==0.1.0 --hash=sha256:00",
        f"{BARE} @ https://example.invalid/x.whl",
        f'importlib.metadata.version("{BARE}")',
    ],
)
def test_the_bare_name_is_found(text: str) -> None:
    assert strangers(text)


@pytest.mark.parametrize(
    "text",
    [
        pip_install("compile"),
        pip_install("tflite", of=AGENT),
        'pip install ./agent "./host[host]"',
        f"{BARE} toolchain install tflite",
        f"git clone <this repository> && cd {BARE}",
        f'prog_name="{BARE}"',
        f"pip install -r /opt/{BARE}/lock.txt",
    ],
)
def test_other_uses_of_the_word_are_not(text: str) -> None:
    assert not strangers(text)


def test_no_file_of_the_tree_installs_a_strangers_package() -> None:
    read = 0
    found = []
    for path in tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        read += 1
        listing = path.suffix in (".in", ".txt")
        found += [f"{path.relative_to(ROOT)}: {one}" for one in strangers(text, listing=listing)]
        unknown = names_in(text) - {HOST, AGENT}
        found += [f"{path.relative_to(ROOT)}: {name} is none of Kedge's" for name in unknown]
    assert read > 500
    assert not found, "\n".join(found)


def test_remedies_name_extras_that_there_are() -> None:
    """Each call of the one function that writes them, with its distribution."""
    extras = {
        name: tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for name, folder in ((HOST, "host"), (AGENT, "agent"))
    }
    calls = []
    for folder in ("host/kedge", "targets/kedge_targets", "agent/kedge_agent"):
        for path in (ROOT / folder).rglob("*.py"):
            calls += re.findall(r"""pip_install\(\s*['"]([\w,-]+)['"](?:,\s*of=(\w+))?""", path.read_text())
    assert len(calls) > 10
    for extra, of in calls:
        assert set(extra.split(",")) <= set(extras[getattr(packages, of or "HOST")]), (extra, of)


def test_the_projects_have_those_names() -> None:
    for folder, name in (("host", HOST), ("agent", AGENT)):
        assert tomllib.loads((ROOT / folder / "pyproject.toml").read_text())["project"]["name"] == name
    assert BARE not in (HOST, AGENT)
