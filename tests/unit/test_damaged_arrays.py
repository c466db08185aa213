"""Damaged .npz and .npy files, of users and of bundles: one clear error, whatever the bytes are."""

from __future__ import annotations

import io
import random
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kedge.evaluation.dataset import Dataset
from kedge_protocol import golden
from kedge_protocol.errors import BundleError, DatasetError

METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
ARRAY = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, ARRAY)
    return file.getvalue()


def npz(method: int, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name in ("input.npy", "label.npy"):
            archive.writestr(name, content)
    return file.getvalue()


def damaged(raw: bytes, chance: random.Random) -> bytes:
    """The same bytes with some overwritten, cut off or put between."""
    hurt = bytearray(raw)
    for _ in range(chance.choice((1, 1, 2, 5))):
        kind, place = chance.random(), chance.randrange(len(hurt) if chance.random() < 0.5 else min(128, len(hurt)))
        if kind < 0.2:
            del hurt[max(place, 1) :]
        elif kind < 0.9:
            hurt[place] = chance.choice((0, 255, ord("9"), ord("("), chance.randrange(256)))
        else:
            hurt[place:place] = chance.randbytes(chance.randrange(1, 9))
    return bytes(hurt)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # NumPy's about headers of Python 2
        yield


def refused(read: Callable[[bytes], object], raw: bytes, error: type[Exception], *, rounds: int) -> int:
    chance, found = random.Random(7), 0
    for _ in range(rounds):
        try:
            read(damaged(raw, chance))
        except error:
            found += 1
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_damaged_npz_is_a_dataset_error(tmp_path: Path, method: int) -> None:
    path = tmp_path / "set.npz"

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        Dataset(path, tmp_path, role="calibration").scan()

    assert refused(read, npz(method, npy()), DatasetError, rounds=300) > 100


def test_damaged_arrays_in_a_folder_or_a_whole_npz_are_a_dataset_error(tmp_path: Path) -> None:
    folder, path, scratch = tmp_path / "set", tmp_path / "set.npz", tmp_path / "scratch"
    folder.mkdir()
    scratch.mkdir()

    def read(raw: bytes) -> None:
        (folder / "input.npy").write_bytes(raw)
        Dataset(folder, scratch, role="calibration").scan()

    def read_npz(raw: bytes) -> None:
        path.write_bytes(npz(zipfile.ZIP_STORED, raw))
        Dataset(path, scratch, role="calibration").scan()

    assert refused(read, npy(), DatasetError, rounds=300) > 100
    assert refused(read_npz, npy(), DatasetError, rounds=300) > 100


def test_a_password_and_an_unknown_compression_are_dataset_errors(tmp_path: Path) -> None:
    raw = bytearray(npz(zipfile.ZIP_STORED, npy()))
    # Flags and method of a member's own header and of the directory's entry (APPNOTE 4.3.7, 4.3.12).
    entry = raw.index(b"PK\x01\x02")
    for own, listed, value, said in ((6, 8, 1, "encrypted"), (8, 10, 99, "compression")):
        hurt = bytearray(raw)
        hurt[own] = hurt[entry + listed] = value
        (tmp_path / "set.npz").write_bytes(hurt)
        with pytest.raises(DatasetError, match=rf"is no \.npz.*{said}"):
            Dataset(tmp_path / "set.npz", tmp_path, role="calibration")


def test_damaged_golden_vectors_are_a_bundle_error(tmp_path: Path) -> None:
    path = tmp_path / "golden.npz"
    golden.save(golden.Golden({"x": ARRAY}, {"y": ARRAY}, {"y": golden.Tolerance(0.1, 0.1)}), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def read(raw: bytes) -> None:
        path.write_bytes(raw)
        golden.load(path)

    def read_member(raw: bytes) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in (members | {"in/x.npy": raw}).items():
                archive.writestr(name, content)
        golden.load(path)

    assert refused(read, whole, BundleError, rounds=300) > 100
    assert refused(read_member, members["in/x.npy"], BundleError, rounds=300) > 100
