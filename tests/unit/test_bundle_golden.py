"""Golden vectors as a file, and the comparison with them."""

from __future__ import annotations

import contextlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kedge_protocol import golden
from kedge_protocol.errors import BundleError, VerificationError
from kedge_protocol.golden import Golden, Tolerance

pytestmark = pytest.mark.device

DTYPES = st.sampled_from(["float32", "float64", "uint8", "int8", "int64", "bool"])


@st.composite
def goldens(draw: st.DrawFn) -> Golden:
    count = draw(st.integers(1, 9))
    names = st.text(st.characters(categories=("L", "N"), include_characters="_./:-"), min_size=1, max_size=12)

    def arrays(dtypes: st.SearchStrategy[str]) -> dict[str, np.ndarray]:
        chosen = draw(st.lists(names, min_size=1, max_size=2, unique=True))
        return {
            name: draw(
                hnp.arrays(
                    draw(dtypes),
                    (count, *draw(hnp.array_shapes(min_dims=0, max_dims=3, max_side=4))),
                    fill=st.nothing(),
                )
            )
            for name in chosen
        }

    outputs = arrays(st.just("float32"))
    return Golden(arrays(DTYPES), outputs, {name: Tolerance(draw(st.floats(0, 1e3)), 0.5) for name in outputs})


@given(vectors=goldens())
def test_what_is_saved_is_loaded_and_has_the_same_bytes_each_time(
    vectors: Golden, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("golden")
    for name in "ab":
        golden.save(vectors, folder / name)
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()
    loaded = golden.load(folder / "a")
    assert loaded.tolerances == vectors.tolerances
    for have, want in ((loaded.inputs, vectors.inputs), (loaded.outputs, vectors.outputs)):
        assert have.keys() == want.keys()
        for name, array in want.items():
            assert have[name].dtype == array.dtype
            np.testing.assert_array_equal(have[name], array)


@given(st.floats(-10, 10), st.floats(0, 5), st.floats(0, 5))
def test_an_output_holds_exactly_if_both_limits_do(shift: float, max_abs: float, rms: float) -> None:
    vectors = Golden({"x": np.zeros((2, 1))}, {"y": np.zeros((2, 2))}, {"y": Tolerance(max_abs, rms)})
    actual = np.array([[shift, 0.0], [0.0, 0.0]])
    (found,) = golden.compare(vectors, {"y": actual})
    assert found.max_abs == abs(shift)
    assert found.rms == pytest.approx(abs(shift) / 2)
    assert found.holds == (abs(shift) <= max_abs and found.rms <= rms)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_holds(bad: float) -> None:
    vectors = Golden({"x": np.zeros((1, 1))}, {"y": np.zeros((1, 1))}, {"y": Tolerance(1e300, 1e300)})
    (found,) = golden.compare(vectors, {"y": np.full((1, 1), bad)})
    assert not found.holds
    with pytest.raises(VerificationError, match="golden vectors do not hold: output 'y'"):
        golden.require([found], where="here")


@pytest.mark.parametrize("actual", [{}, {"y": np.zeros((1, 2))}, {"other": np.zeros((1, 1))}])
def test_outputs_of_another_name_or_shape_are_refused(actual: dict[str, np.ndarray]) -> None:
    vectors = Golden({"x": np.zeros((1, 1))}, {"y": np.zeros((1, 1))}, {"y": Tolerance(1, 1)})
    with pytest.raises(VerificationError):
        golden.compare(vectors, actual)


@given(raw=st.binary(max_size=200))
def test_bytes_that_are_no_vectors_are_an_error_of_our_own(
    raw: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    path.write_bytes(raw)
    with pytest.raises(BundleError):
        golden.load(path)


def written(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **{name.replace("__", "/"): array for name, array in arrays.items()})
    return path


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"in__x": np.zeros((2, 1)), "out__y": np.zeros((2, 1))},
        {"in__x": np.zeros((2, 1)), "out__y": np.zeros((3, 1)), "tol__y": np.zeros(2)},
        {"in__x": np.zeros((0, 1)), "out__y": np.zeros((0, 1)), "tol__y": np.zeros(2)},
        {"in__x": np.zeros((2, 1)), "out__y": np.zeros((2, 1)), "tol__z": np.zeros(2)},
        {"out__y": np.zeros((2, 1)), "tol__y": np.zeros(2)},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    with pytest.raises(BundleError, match="do not belong together"):
        golden.load(written(tmp_path / "g.npz", **arrays))


def test_a_tolerance_of_one_number_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "g.npz", in__x=np.zeros((2, 1)), out__y=np.zeros((2, 1)), tol__y=np.zeros(1))
    with pytest.raises(BundleError):
        golden.load(path)


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "g.npz", "w") as archive:
        archive.writestr("in/x.npy", b"no array")
    with pytest.raises(BundleError, match="'in/x' is no array"):
        golden.load(tmp_path / "g.npz")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.array([object()], dtype=object), allow_pickle=True)
    path = tmp_path / "g.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("in/x.npy", buffer.getvalue())
    with pytest.raises(BundleError):
        golden.load(path)


@given(data=st.data())
def test_a_damaged_file_is_an_error_of_our_own_or_still_whole(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("golden") / "golden.npz"
    golden.save(Golden({"x": np.ones((2, 3))}, {"y": np.ones((2, 1))}, {"y": Tolerance(1, 1)}), path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    with contextlib.suppress(BundleError):
        golden.load(path)
