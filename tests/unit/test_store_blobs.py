"""The store of blobs: only what has the right hash counts, whatever happened before."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.update_world import block_map, make_release, opened, sample

from kedge_agent.store import Store
from kedge_protocol import digest as digests
from kedge_protocol.blocks import BLOCK_SIZE, block_count
from kedge_protocol.bundle.layout import parse_bundle
from kedge_protocol.errors import DigestMismatchError, StorageError

pytestmark = pytest.mark.device


def write_all(store: Store, data: bytes, indices: list[int]) -> None:
    for index in indices:
        store.write(digests.of_bytes(data), index, data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])


def test_a_blob_grows_block_by_block_and_takes_its_place_whole(tmp_path: Path) -> None:
    store, data = Store(tmp_path), sample(1, 3 * BLOCK_SIZE + 17)
    name = digests.of_bytes(data)
    assert opened(store, data) == []
    write_all(store, data, [3, 0, 2])
    assert not store.has(name, len(data))
    write_all(store, data, [1])
    store.finish(name)
    assert store.has(name, len(data))
    assert store.blob_path(name).read_bytes() == data
    assert store.blob_path(name).stat().st_mode & 0o222 == 0
    assert not list((tmp_path / "partial").iterdir())


@settings(max_examples=40, deadline=None)
@given(
    size=st.integers(1, 6 * BLOCK_SIZE),
    written=st.sets(st.integers(0, 5)),
    torn=st.sets(st.integers(0, 5)),
    seed=st.integers(0, 1000),
)
def test_after_a_restart_exactly_the_blocks_with_the_right_bytes_are_finished(
    size: int, written: set[int], torn: set[int], seed: int
) -> None:
    data, count = sample(seed, size), block_count(size)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        opened(store, data)
        write_all(store, data, [index for index in written if index < count])
        store.close(digests.of_bytes(data))
        partial = Path(folder) / "partial" / digests.hex_of(digests.of_bytes(data))
        damaged = {index for index in torn if index < count}
        raw = bytearray(partial.read_bytes())
        for index in damaged:
            raw[index * BLOCK_SIZE] ^= 0xFF
        partial.write_bytes(raw)
        right = {
            i
            for i in range(count)
            if raw[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE] == data[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
        }
        again = Store(Path(folder))
        assert set(opened(again, data)) == right
        again.close(digests.of_bytes(data))


def test_a_partial_file_of_another_length_is_no_trouble(tmp_path: Path) -> None:
    store, data = Store(tmp_path), sample(1, 4 * BLOCK_SIZE)
    partial = tmp_path / "partial" / digests.hex_of(digests.of_bytes(data))
    partial.write_bytes(data[: BLOCK_SIZE + 100] + b"x" * 10 * BLOCK_SIZE)
    assert opened(store, data) == [0]
    write_all(store, data, [1, 2, 3])
    store.finish(digests.of_bytes(data))


def test_a_whole_with_a_wrong_digest_is_dropped(tmp_path: Path) -> None:
    store, data = Store(tmp_path), sample(1, 2 * BLOCK_SIZE)
    lie = digests.of_bytes(b"something else")
    hashes = block_map(data)
    store.open(lie, len(data), map_digest=digests.of_bytes(hashes), block_map=hashes)
    for index in range(2):
        store.write(lie, index, data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    with pytest.raises(DigestMismatchError, match="the whole has digest"):
        store.finish(lie)
    assert not list((tmp_path / "partial").iterdir())
    assert not store.has(lie, len(data))


def test_a_map_that_does_not_fit_its_digest_is_not_used(tmp_path: Path) -> None:
    store, data = Store(tmp_path), sample(1, 2 * BLOCK_SIZE)
    name, hashes = digests.of_bytes(data), block_map(data)
    (tmp_path / "maps" / digests.hex_of(name)).write_bytes(hashes[:-1] + b"\0")
    event = store.open(name, len(data), map_digest=digests.of_bytes(hashes))
    assert (event.block_map, event.complete, event.error) == (None, False, None)


def test_blocks_of_older_blobs_are_copied_and_damaged_ones_are_not(tmp_path: Path) -> None:
    store, old = Store(tmp_path), sample(1, 5 * BLOCK_SIZE)
    opened(store, old)
    write_all(store, old, [0, 1, 2, 3, 4])
    store.finish(digests.of_bytes(old))
    path = store.blob_path(digests.of_bytes(old))
    path.chmod(0o644)
    raw = bytearray(old)
    raw[3 * BLOCK_SIZE] ^= 1
    path.write_bytes(raw)
    # Shifted by a block, so that offsets differ; block 3 of the old blob is damaged on disk.
    new = sample(2, BLOCK_SIZE) + old
    assert opened(store, new) == [1, 2, 3, 5]


def test_a_complete_blob_that_the_disk_changed_is_pulled_again_where_it_is_read(tmp_path: Path) -> None:
    store = Store(tmp_path)
    name = digests.of_bytes(b"manifest")
    store.put(name, b"manifest")
    assert store.open(name, 8, read=True).data == b"manifest"
    store.blob_path(name).chmod(0o644)
    store.blob_path(name).write_bytes(b"manifesT")
    event = store.open(name, 8, read=True)
    assert (event.complete, event.data) == (False, None)
    assert not store.has(name, 8)


def test_garbage_goes_and_what_is_kept_or_open_stays(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = [digests.of_bytes(word) for word in (b"a", b"b")]
    store.put(names[0], b"a")
    store.put(names[1], b"b")
    (tmp_path / "blobs" / "sha256" / ".leftover.x").write_bytes(b"")
    data = sample(1, 2 * BLOCK_SIZE)
    opened(store, data)
    store.collect([names[0]])
    assert [path.name for path in (tmp_path / "blobs" / "sha256").iterdir()] == [digests.hex_of(names[0])]
    assert len(list((tmp_path / "partial").iterdir())) == 1
    store.close(digests.of_bytes(data))
    store.collect([])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_missing_bytes_count_neither_complete_blobs_nor_written_blocks(tmp_path: Path) -> None:
    store, data = Store(tmp_path), sample(1, 4 * BLOCK_SIZE)
    release = make_release({"model.bin": data, "small.txt": b"x" * 1000})
    config = next(blob for blob in release.blobs.values() if b"schema_version" in blob)
    bundle = parse_bundle(release.blobs[release.digest], config, where="test")
    golden = len(release.files["golden.npz"])
    assert store.missing_bytes(bundle) == len(data) + 1000 + golden
    store.put(digests.of_bytes(b"x" * 1000), b"x" * 1000)
    opened(store, data)
    write_all(store, data, [0, 1])
    assert store.missing_bytes(bundle) <= 2 * BLOCK_SIZE + golden


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path) -> None:
    """``/dev/full`` stands in for the disk: each write to it fails as on a full one."""
    store, data = Store(tmp_path), sample(1, 2 * BLOCK_SIZE)
    name = digests.of_bytes(data)
    opened(store, data)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, store._files[name])
    os.close(full)
    with pytest.raises(OSError, match="No space left"):
        write_all(store, data, [0])


def test_a_state_folder_that_cannot_be_made_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Check the free space"):
        Store(tmp_path / "file" / "state")


WRITER = """
import sys
from pathlib import Path
from tests.support.update_world import opened, sample
from kedge_agent.store import Store
from kedge_protocol import digest as digests
from kedge_protocol.blocks import BLOCK_SIZE, block_count
store, data = Store(Path(sys.argv[1])), sample(7, 300 * BLOCK_SIZE)
done, name = opened(store, data), digests.of_bytes(data)
print(len(done), flush=True)
for index in range(block_count(len(data))):
    if index not in done:
        store.write(name, index, data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
store.finish(name)
print("finished", flush=True)
"""


def test_a_writer_killed_at_any_point_costs_no_finished_block(tmp_path: Path) -> None:
    finished, chance = 0, random.Random(3)
    for attempt in range(8):
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
        )
        assert child.stdout is not None
        done = int(child.stdout.readline() or b"-1")
        if done < 0 or attempt == 7:
            break
        assert done >= finished
        finished = done
        time.sleep(chance.uniform(0.0, 0.008))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if list((tmp_path / "blobs" / "sha256").iterdir()):
            break
    else:
        pytest.fail("never came to an end")
    child.wait()
    child.stdout.close()
    data = sample(7, 300 * BLOCK_SIZE)
    store = Store(tmp_path)
    assert store.has(digests.of_bytes(data), len(data))
    assert store.blob_path(digests.of_bytes(data)).read_bytes() == data


def test_a_system_that_writes_little_at_a_time_makes_no_wrong_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, old = Store(tmp_path), sample(1, 3 * BLOCK_SIZE)
    opened(store, old)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, bytes(data[:1000]), offset))
    for index in range(3):
        store.write(digests.of_bytes(old), index, old[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE])
    store.finish(digests.of_bytes(old))
    # Two blocks are copied from the older blob.
    new = old[: 2 * BLOCK_SIZE] + sample(2, BLOCK_SIZE)
    assert opened(store, new) == [0, 1]
    partial = (tmp_path / "partial" / digests.of_bytes(new).partition(":")[2]).read_bytes()
    assert partial[: 2 * BLOCK_SIZE] == new[: 2 * BLOCK_SIZE]


def test_a_disk_that_takes_nothing_more_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, data = Store(tmp_path), sample(1, BLOCK_SIZE + 1)
    opened(store, data)
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: 0)
    with pytest.raises(OSError, match="No space left"):
        store.write(digests.of_bytes(data), 0, data[:BLOCK_SIZE])
