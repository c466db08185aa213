"""A full disk, wherever the compiler meets it: one clear error, no OUT, nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.compiling import Inputs, kedge, small_inputs, without_progress

from kedge_protocol.bundle.layout import Layout

PAGE = 4096


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return small_inputs(tmp_path)


@pytest.fixture
def disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of so many pages."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={request.param * PAGE}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("a file system cannot be mounted here; the limit on files' size is tested instead")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("disk", [1, 2, 3, 4, 6, 8, 10, 12, 14, 16], indirect=True)
def test_a_full_disk(inputs: Inputs, disk: Path) -> None:
    done = kedge(dataclasses.replace(inputs, out=disk / "OUT").arguments())
    if done.returncode == 0:
        Layout(disk / "OUT").verify()  # it fitted, so it must be whole
        return
    assert done.returncode == 1
    errors = without_progress(done.stderr)
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert "space" in errors[0]
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("disk", [256], indirect=True)
def test_a_disk_that_is_large_enough(inputs: Inputs, disk: Path) -> None:
    done = kedge(dataclasses.replace(inputs, out=disk / "OUT").arguments())
    assert done.returncode == 0, done.stderr
    Layout(disk / "OUT").verify()


@pytest.mark.parametrize("limit", [512, 2048, 5000])
def test_files_that_may_not_grow(inputs: Inputs, limit: int) -> None:
    """The same met as EFBIG; needs no rights."""
    arguments = [sys.executable, "-m", "kedge.cli.main", *inputs.arguments()]
    done = subprocess.run(
        arguments,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1
    assert without_progress(done.stderr)[0].startswith("error: ")
    assert not inputs.out.exists()
    assert [path.name for path in inputs.out.parent.iterdir() if path.name.startswith(".")] == []


def test_a_folder_that_cannot_be_made(inputs: Inputs) -> None:
    done = kedge(dataclasses.replace(inputs, out=inputs.model / "OUT").arguments())
    assert done.returncode == 1
    assert without_progress(done.stderr)[0].startswith("error: ")
    assert "cannot be written" in done.stderr
