"""The sensitivity as a picture: sound SVG, every bar where it belongs, the choice marked."""

from __future__ import annotations

import itertools
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import pytest

import kedge.report
from kedge.quantization.sensitivity import LayerSensitivity, Sensitivity
from kedge.report.plots import sensitivity_plot
from kedge.report.plots.sensitivity_plot import LEFT, RIGHT, WIDTH, Plot

SVG = "{http://www.w3.org/2000/svg}"


def layer(name: str, **figures: float) -> LayerSensitivity:
    named = {key.replace("_", "-"): value for key, value in figures.items()}
    return LayerSensitivity(name=name, operator="Conv", weights=1234, sqnr_db=named, drop=dict.fromkeys(named, 0.01))


def drawn(plot: Plot) -> ElementTree.Element:
    """The template's SVG, parsed."""
    folder = Path(kedge.report.__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("sensitivity.html.j2").render(sensitivity=plot)
    start, end = page.index("<svg"), page.index("</svg>") + len("</svg>")
    return ElementTree.fromstring(page[start:end].replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))


def told(*layers: LayerSensitivity, left_out: tuple[str, ...] = ()) -> Sensitivity:
    return Sensitivity(metric="top1", samples=50, layers=layers, left_out=left_out)


def test_each_precision_is_a_bar_and_the_choice_is_marked() -> None:
    plot = sensitivity_plot.plot(
        told(layer("first", int8=30.0, w4a4=12.0, float16=80.0), layer("second", int8=5.0, w4a4=-20.0)),
        {"first": "w4a4", "second": "float32"},
        why={"second": "alone in int8 it drops too much"},
    )
    first, second = plot.rows
    assert [bar.precision for bar in first.bars] == ["w4a4", "int8", "float16"]
    widths = {bar.precision: bar.width for bar in first.bars}
    assert widths["int8"] == pytest.approx(2.5 * widths["w4a4"])
    assert widths["float16"] == pytest.approx(RIGHT - LEFT)
    assert [bar.chosen for bar in first.bars] == [True, False, False]
    assert (second.choice, second.bars[0].width, second.bars[0].text) == ("float32", 0.0, "-20.0 dB")
    assert "drops too much" in second.title
    assert [name for name, _ in plot.legend] == ["w4a4", "int8", "float16", "float32"]
    rectangles = list(drawn(plot).iter(f"{SVG}rect"))
    assert len(rectangles) == 5
    assert [one.get("stroke") is not None for one in rectangles] == [True, False, False, False, False]


def test_nothing_lies_outside_or_on_another() -> None:
    layers = [layer(f"layer<{index}>&", int8=float(index), int8_dynamic=150.0, int4=-150.0) for index in range(30)]
    plot = sensitivity_plot.plot(told(*layers), {})
    picture = drawn(plot)
    box = [float(number) for number in picture.get("viewBox", "").split()]
    assert box[2:] == [WIDTH, plot.height]
    places = []
    for one in picture.iter(f"{SVG}rect"):
        x, y, width, height = (float(one.get(name, "nan")) for name in ("x", "y", "width", "height"))
        assert x == LEFT
        assert 0 <= width <= RIGHT - LEFT + 0.1
        assert y > 0
        assert y + height <= plot.height
        places.append((y, y + height))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(places))
    texts = [element.text or "" for element in picture.iter(f"{SVG}text")]
    assert "layer<3>&" in texts
    assert "no noise" in texts


def test_many_layers_are_cut_down_to_the_worst_and_said_to_be() -> None:
    layers = [layer(f"encoder.layers.{index}.attention.projection.weight", int8=float(index)) for index in range(120)]
    plot = sensitivity_plot.plot(told(*layers, layer("unmeasured"), left_out=("last: the time was up",)), {})
    assert len(plot.rows) == 80
    assert plot.rows[0].title.startswith("encoder.layers.0.")
    assert plot.rows[0].label.startswith("…")
    assert plot.rows[-1].title.startswith("encoder.layers.79.")
    assert plot.notes[0] == "last: the time was up"
    assert "the 40 least sensitive of 120" in plot.notes[1]


def test_nothing_measured_is_an_empty_picture() -> None:
    assert drawn(sensitivity_plot.plot(told(), {})).tag == f"{SVG}svg"
