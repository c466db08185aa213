"""Regions of text: connected pixels, the smallest rectangle, reading order, cuttings, and what the next models say."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kedge_protocol.bundle.pipeline import Colour, Fit, Picture, Regions, Then
from kedge_protocol.errors import InputError
from kedge_targets.pipeline import chains, examples, pictures, regions, resampling
from kedge_targets.pipeline.answers import Box, Label, Region, Text, to_json
from kedge_targets.pipeline.pictures import Placement

Array = npt.NDArray[Any]


def flooded(marked: Array) -> list[set[tuple[int, int]]]:
    """Sets of connected pixels as (x, y), by flooding."""
    left = {(int(x), int(y)) for y, x in zip(*np.nonzero(marked), strict=True)}
    found = []
    while left:
        start = left.pop()
        queue, one = deque([start]), {start}
        while queue:
            x, y = queue.popleft()
            for near in ((x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    one.add(near)
                    queue.append(near)
        found.append(one)
    return found


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 14), st.integers(1, 18), st.floats(0.1, 0.9), st.integers(0, 1 << 16))
def test_connected_pixels_are_those_of_a_flood(height: int, width: int, share: float, seed: int) -> None:
    marked = np.random.default_rng(seed).random((height, width)) < share
    found = [{(int(x), int(y)) for x, y in points} for points in regions.outlines(marked, 1, 1000)]
    whole = flooded(marked)
    assert len(found) == len(whole)
    for one in found:
        (owner,) = [each for each in whole if one <= each]
        rows = {y for _, y in owner}
        ends = {(pick(x for x, y in owner if y == row), row) for row in rows for pick in (min, max)}
        assert ends <= one


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=25))
def test_no_rectangle_of_any_angle_is_smaller(points: list[tuple[int, int]]) -> None:
    array = np.asarray(points)
    centre, axes, halves = regions.smallest_rectangle(regions.hull(array))
    apart = np.abs((array - centre) @ axes.T)
    assert (apart <= halves + 1e-6).all()
    for angle in np.linspace(0, np.pi / 2, 91):
        turned = array @ np.asarray([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        assert np.prod(np.ptp(turned, axis=0)) >= 4 * np.prod(halves) - 1e-6


def drawn(corners: Array, size: tuple[int, int]) -> Array:
    """A map with 0.9 within a rectangle and 0.05 elsewhere."""
    across, down = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    inside = np.ones(across.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (bx - ax) * (down - ay) - (by - ay) * (across - ax) >= 0
    return np.where(inside, 0.9, 0.05).astype(np.float32)


@pytest.mark.parametrize("degrees", [0, 12, -25])
def test_a_tilted_rectangle_is_found_where_it_is(degrees: int) -> None:
    angle = np.deg2rad(degrees)
    turn = np.asarray([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    corners = np.asarray([[-60, -8], [60, -8], [60, 8], [-60, 8]]) @ turn + [100, 80]
    placement = Placement((400, 320), (200, 160), (0.5, 0.5), (0.0, 0.0))
    (found,) = regions.decode(drawn(corners, (200, 160))[None], Regions(grow=0, dilate=False), placement)
    assert found.score == pytest.approx(0.9, abs=0.06)
    np.testing.assert_allclose(np.asarray(found.corners), corners * 2, atol=4)
    (grown,) = regions.decode(drawn(corners, (200, 160))[None], Regions(grow=1.6, dilate=False), placement)
    outwards = 1.6 * (120 * 16) / (2 * 136)
    sides = np.linalg.norm(np.diff(np.asarray(grown.corners), axis=0), axis=1)
    np.testing.assert_allclose(sides[:2], (2 * (120 + 2 * outwards), 2 * (16 + 2 * outwards)), atol=6)


def test_regions_come_row_by_row_and_weak_ones_not_at_all() -> None:
    shown = np.zeros((100, 200), np.float32)
    shown[12:22, 120:180] = 0.9
    shown[10:20, 10:80] = 0.8
    shown[60:70, 10:60] = 0.7
    shown[60:70, 100:160] = 0.4
    shown[90, 5] = 0.9
    placement = Placement((200, 100), (200, 100), (1.0, 1.0), (0.0, 0.0))
    found = regions.decode(shown, Regions(dilate=False), placement)
    assert [round(one.score, 1) for one in found] == [0.8, 0.9, 0.7]
    assert found[0].corners[0][0] < found[1].corners[0][0]
    assert len(regions.decode(shown, Regions(most=1, dilate=False), placement)) == 1
    assert regions.decode(np.zeros((4, 4), np.float32), Regions(), placement) == []
    with pytest.raises(InputError, match="2x4x4 is no map"):
        regions.decode(np.zeros((2, 4, 4), np.float32), Regions(), placement)


def test_a_cutting_is_straight_and_at_whole_pixels_the_very_pixels() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (60, 90, 3)).astype(np.uint8)
    corners = np.asarray([[10, 20], [70, 20], [70, 45], [10, 45]], float)
    np.testing.assert_array_equal(pictures.cut(pixels, corners), pixels[20:45, 10:70])
    across, down = np.meshgrid(np.arange(10.0, 70), np.arange(20.0, 45))
    np.testing.assert_array_equal(resampling.sampled(pixels, across, down), pixels[20:45, 10:70])
    half_turn = np.roll(corners, 2, axis=0)
    turned = pictures.cut(pixels, half_turn)
    np.testing.assert_array_equal(turned[:, :], pixels[45:20:-1, 70:10:-1])
    with pytest.raises(InputError, match="one line"):
        pictures.cut(pixels, np.asarray([[0, 0], [10, 10], [20, 20], [30, 30]], float))


def test_a_slope_stays_a_slope_in_perspective() -> None:
    across, down = np.meshgrid(np.arange(100.0), np.arange(80.0))
    pixels = np.repeat((across + down)[..., None], 3, axis=2).astype(np.uint8)
    corners = np.asarray([[20, 10], [80, 20], [75, 60], [15, 50]], float)
    made = pictures.cut(pixels, corners).astype(int)[..., 0]
    assert abs(made[0, 0] - 30) <= 1
    assert (np.diff(made, axis=1) >= 0).all()
    assert (np.diff(made, axis=0) >= 0).all()
    assert abs(made[-1, -1] - 135) <= 3


@pytest.mark.parametrize(
    ("size", "wanted"), [((800, 600), (992, 736)), ((3000, 1000), (1984, 672)), ((2000, 100), (1984, 96))]
)
def test_a_free_picture_has_sides_of_a_multiple(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    made, placement = pictures.place(
        np.zeros((size[1], size[0], 3), np.uint8), Picture(fit=Fit.FREE, layout="NHWC", antialias=False)
    )
    assert (made.shape[1], made.shape[0]) == placement.input_size
    assert all(side % 32 == 0 for side in placement.input_size)
    assert np.abs(np.subtract(placement.input_size, wanted)).max() <= 32
    whole = placement.to_picture(np.asarray([[0, 0, 1, 1]]))
    np.testing.assert_allclose(whole[0], [0, 0, *size])


def test_a_line_grows_with_its_length_up_to_the_widest() -> None:
    how = Picture(width=40, height=10, fit=Fit.LINE, widest=90, layout="NHWC", colour=Colour.RGB)
    widths = [pictures.place(np.zeros((20, length, 3), np.uint8), how)[0].shape[1] for length in (30, 120, 900)]
    assert widths == [40, 60, 90]


REGION = Region(0.9, ((0.0, 0.0), (40.0, 0.0), (40.0, 10.0), (0.0, 10.0)))


def models(**known: Any) -> Any:
    return known.__getitem__


def test_a_classifier_says_how_a_cutting_is_turned() -> None:
    pixels = np.arange(40 * 10 * 3, dtype=np.uint32).reshape(10, 40, 3).astype(np.uint8)
    seen: list[Array] = []

    def read(part: Array) -> Text:
        seen.append(part)
        return Text("abc", 0.8)

    how = Then(model="read", turned_by="turn")
    for name, score, quarters in (("180", 0.95, 2), ("180", 0.85, 0), ("0", 0.99, 0), ("90", 0.99, 1)):
        said = [Label(name, 0, score)]
        (one,) = chains.followed([REGION], pixels, how, models(read=read, turn=lambda _, said=said: said))
        assert one.then == Text("abc", 0.8)
        np.testing.assert_array_equal(seen[-1], np.rot90(pixels, quarters))
    with pytest.raises(InputError, match="by how many degrees"):
        chains.followed([REGION], pixels, how, models(read=read, turn=lambda _: [Label("cat", 0, 1.0)]))


def test_weak_and_empty_texts_are_left_out_and_order_is_kept() -> None:
    pixels = np.zeros((100, 100, 3), np.uint8)
    parts = [Region(0.9, tuple((x, y + 10.0 * row) for x, y in REGION.corners)) for row in range(5)]
    texts = iter([Text("a", 0.9), Text(" ", 0.9), Text("c", 0.3), Text("d", 0.6), Text("e", 0.7)])
    answers = {row: next(texts) for row in range(5)}
    for row in range(5):
        pixels[10 * row : 10 * row + 10] = row
    other = models(read=lambda part: answers[int(part[0, 0, 0])])
    found = chains.followed(parts, pixels, Then(model="read", answer_floor=0.5), other)
    assert [one.then.text for one in found] == ["a", "d", "e"]
    few = chains.followed(parts, pixels, Then(model="read", most=2), other)
    assert [one.then and one.then.text for one in few] == ["a", " ", None, None, None]


def test_a_line_that_runs_upwards_is_laid_down() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (80, 30, 3)).astype(np.uint8)
    upright = Region(0.9, ((5.0, 10.0), (25.0, 10.0), (25.0, 70.0), (5.0, 70.0)))
    seen: list[Array] = []
    chains.followed([upright], pixels, Then(model="read"), models(read=seen.append))
    np.testing.assert_array_equal(seen[0], np.rot90(pixels[10:70, 5:25]))
    box = Box("a", 0, 0.9, 5.0, 10.0, 25.0, 70.0)
    chains.followed([box], pixels, Then(model="read"), models(read=seen.append))
    np.testing.assert_array_equal(seen[1], pixels[10:70, 5:25])


def test_examples_of_regions_are_compared_by_their_corners() -> None:
    moved = Region(0.85, tuple((x + 1.5, y) for x, y in REGION.corners))
    answer, other = to_json([REGION]), to_json([moved])
    assert answer[0]["corners"][1] == [40.0, 0.0]
    found = examples.deviations(answer, other, 0.05, floor=0.5)
    assert found["corner"] == pytest.approx(1.5)
    assert found["score"] == pytest.approx(0.05)
    assert examples.deviations(answer, [], 0.05, floor=0.5)["corner"] == float("inf")
