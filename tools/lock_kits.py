"""Locks of the boards' Python packages: ``make locks`` writes ``firmware-configs/**/lock-ARCHITECTURE.txt`` anew.

``pip.in`` says what a board needs. uv resolves it for the release's Python and the architecture; pip then says which
wheel it would take there, and that wheel's hash is written down. Only wheels: nothing is built on a board.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent
BOARDS = TREE / "firmware-configs"
RELEASES = {
    "debian-12": ("3.11", 36),
    "raspbian-12": ("3.11", 36),
    "ubuntu-22.04": ("3.10", 35),
    "ubuntu-24.04": ("3.12", 39),
}
"""``ID-VERSION_ID`` → its Python, and glibc 2.N."""
MACHINES = {"amd64": "x86_64", "arm64": "aarch64", "armhf": "armv7l"}
"""Debian's architecture → the machine in a wheel's name."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """One set of packages.

    Attributes:
        source: the ``pip.in``.
        lock: where its lock is.
        image: packages that the board's image brings.
    """

    source: Path
    lock: Path
    release: str
    architecture: str
    image: frozenset[str]


def boards() -> Iterator[Board]:
    """Every set that a kit needs."""
    for source in sorted(BOARDS.rglob("pip.in")):
        packages = source.parent if source.parent.name == "packages" else source.parent.parent
        text = source.read_text(encoding="utf-8")
        own = [source.parent.name] if source.parent != packages else _releases(packages)
        (architectures,) = re.findall(r"^# architectures: (.*)$", text, re.M)
        for release in own:
            if source.parent == packages and (packages / release / "pip.in").is_file():
                continue
            for architecture in architectures.split():
                of_image = re.findall(rf"^# from the board's image on {architecture}.*: (.*)$", text, re.M)
                yield Board(
                    source=source,
                    lock=packages / release / f"lock-{architecture}.txt",
                    release=release,
                    architecture=architecture,
                    image=frozenset(" ".join(of_image).split()),
                )


def _releases(packages: Path) -> list[str]:
    """Those that the folder or one above it has packages of the distribution for."""
    for folder in (packages, packages.parent.parent / "packages"):
        if found := sorted(path.parent.name for path in folder.glob("*/apt.txt")):
            return found
    return []


def locked(board: Board) -> str:
    """The content of a board's lock."""
    pins = [pin for pin in _resolved(board) if pin.partition("==")[0] not in board.image]
    lines = [
        f"# {board.release}, {board.architecture}."
        f" Written by `make locks` from {board.source.relative_to(BOARDS)}: change that.",
    ]
    if board.image:
        lines.append(f"# From the board's image: {', '.join(sorted(board.image))}.")
    for name, version, digest in sorted(_wheels(board, pins)):
        lines += [f"{name}=={version} \\", f"    --hash=sha256:{digest}"]
    return "\n".join(lines) + "\n"


def _resolved(board: Board) -> list[str]:
    python, _ = RELEASES[board.release]
    machine = MACHINES[board.architecture]
    with tempfile.TemporaryDirectory() as scratch:
        lines = board.source.read_text(encoding="utf-8")
        source = Path(scratch) / "pip.in"
        source.write_text(re.sub(r"^kedge-agent(\S*)", rf"kedge-agent\1 @ file://{TREE / 'agent'}", lines, flags=re.M))
        command = [sys.executable, "-m", "uv", "pip", "compile", "-q", "--no-header", "--no-annotate", str(source)]
        command += ["--python-version", python]
        if machine != "armv7l":  # uv knows no such platform; what has no wheel there is the image's.
            command += ["--python-platform", f"{machine}-manylinux_2_{RELEASES[board.release][1]}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{board.lock}: {done.stderr}")
    pins = (line.partition(";")[0].strip() for line in done.stdout.splitlines() if "==" in line)
    return [pin for pin in pins if not pin.startswith("kedge-agent")]


def _wheels(board: Board, pins: list[str]) -> Iterator[tuple[str, str, str]]:
    """Name, version and SHA-256 of the wheel that pip takes there."""
    done = subprocess.run(pip(board, *pins), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{board.lock}: {done.stderr[-1000:]}")
    for one in json.loads(done.stdout)["install"]:
        digest = one["download_info"]["archive_info"]["hashes"]["sha256"]
        yield re.sub(r"[-_.]+", "-", one["metadata"]["name"]).lower(), one["metadata"]["version"], digest


def pip(board: Board, *arguments: str) -> list[str]:
    """pip's command that reports what it would install on a board, and installs nothing."""
    python, glibc = RELEASES[board.release]
    machine = MACHINES[board.architecture]
    tags = [f"manylinux_2_{minor}" for minor in range(glibc, 4, -1)] + ["manylinux2014", "manylinux2010", "manylinux1"]
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--dry-run",
        "--ignore-installed",
        "--no-deps",
        "--report",
        "-",
    ]
    command += ["--ignore-requires-python"]  # pip holds it against its own Python; uv has seen to it
    command += ["--only-binary=:all:", "--target", "unused", "--implementation", "cp", "--python-version", python]
    for abi in (f"cp{python.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for tag in (*tags, "linux"):
        command += ["--platform", f"{tag}_{machine}"]
    return [*command, *arguments]


if __name__ == "__main__":
    for found in boards():
        found.lock.parent.mkdir(exist_ok=True)
        found.lock.write_text(locked(found), encoding="utf-8")
        sys.stdout.write(f"{found.lock.relative_to(TREE)}\n")
