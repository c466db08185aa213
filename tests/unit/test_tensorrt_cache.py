"""The cache of engines: what was not made here, by this user, for this name, is never given out."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge_protocol.errors import StorageError, WorkerTimeoutError
from kedge_targets.backends.tensorrt.cache import Cache, Kept, name_of


def kept_file(cache: Cache, name: str) -> Path:
    return cache.folder / f"{name}.kept"


def test_what_is_stored_is_found_by_another_process(tmp_path: Path) -> None:
    Cache(tmp_path / "c").store("engine-1", {"seconds": 1.5}, b"\0payload")
    assert Cache(tmp_path / "c").load("engine-1") == Kept({"seconds": 1.5}, b"\0payload")
    assert Cache(tmp_path / "c").load("engine-2") is None


@given(where=st.integers(0, 200), bit=st.integers(0, 7))
def test_one_changed_bit_makes_it_absent(tmp_path_factory: pytest.TempPathFactory, where: int, bit: int) -> None:
    cache = Cache(tmp_path_factory.mktemp("c"))
    cache.store("engine-1", {"tensorrt": "10.3"}, bytes(100))
    path = kept_file(cache, "engine-1")
    raw = bytearray(path.read_bytes())
    raw[where % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    assert cache.load("engine-1") is None
    assert not path.exists(), "it is not looked at a second time"


@pytest.mark.parametrize("length", [0, 1, 31, 32, 35, 40])
def test_a_file_cut_short_is_absent(tmp_path: Path, length: int) -> None:
    cache = Cache(tmp_path)
    cache.store("engine-1", {"tensorrt": "10.3"}, bytes(100))
    path = kept_file(cache, "engine-1")
    path.write_bytes(path.read_bytes()[:length])
    assert cache.load("engine-1") is None


def test_a_file_under_another_name_is_absent(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store("engine-1", {}, b"one")
    kept_file(cache, "engine-1").rename(kept_file(cache, "engine-2"))
    assert cache.load("engine-2") is None


def test_a_file_of_another_device_is_absent(tmp_path: Path) -> None:
    ours, theirs = Cache(tmp_path / "ours"), Cache(tmp_path / "theirs")
    theirs.store("engine-1", {}, b"theirs")
    kept_file(ours, "engine-1").write_bytes(kept_file(theirs, "engine-1").read_bytes())
    assert ours.load("engine-1") is None


def test_the_key_is_nobody_elses(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert (cache.folder / "key").stat().st_mode & 0o077 == 0
    assert cache.folder.stat().st_mode & 0o077 == 0
    assert len((cache.folder / "key").read_bytes()) == 32


def test_a_broken_key_is_made_anew_and_nothing_old_is_trusted(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.store("engine-1", {}, b"one")
    (tmp_path / "key").write_bytes(b"short")
    assert Cache(tmp_path).load("engine-1") is None


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(StorageError, match="others may write"):
        Cache(folder)


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="KEDGE_CACHE"):
        Cache(tmp_path / "file" / "c")


def test_what_was_unused_longest_goes_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=3500)
    for number in range(3):
        cache.store(f"engine-{number}", {}, bytes(1000))
        os.utime(kept_file(cache, f"engine-{number}"), ns=(number, number))
    assert cache.load("engine-0") is not None  # used again: now it is the newest
    cache.store("engine-3", {}, bytes(1000))
    assert [cache.load(f"engine-{number}") is not None for number in range(4)] == [True, False, True, True]


def test_one_larger_than_all_is_kept_still(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit_bytes=100)
    cache.store("engine-0", {}, bytes(1000))
    assert cache.load("engine-0") is not None


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    order = []

    def second() -> None:
        with Cache(tmp_path).alone("engine-1", seconds=30):
            order.append("second")

    with Cache(tmp_path).alone("engine-1", seconds=1):
        thread = threading.Thread(target=second)
        thread.start()
        with pytest.raises(WorkerTimeoutError), Cache(tmp_path).alone("engine-1", seconds=0.2):
            pass
        order.append("first")
        time.sleep(0.2)
        order.append("first's end")
    thread.join(30)
    assert order == ["first", "first's end", "second"]


def test_the_name_tells_everything_apart() -> None:
    base = {"graph": "sha256:1", "tensorrt": "10.3.0", "capability": "8.7", "power_mode": "15W"}
    names = {name_of("engine", base)}
    for key in base:
        names.add(name_of("engine", {**base, key: "other"}))
    names.add(name_of("choice", base))
    assert len(names) == len(base) + 2
    assert name_of("engine", dict(reversed(base.items()))) == name_of("engine", base)
