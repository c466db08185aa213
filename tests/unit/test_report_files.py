"""The report: figures in, one JSON file and one self-contained page out."""

from __future__ import annotations

import dataclasses
import html
import html.parser
import json
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from kedge.evaluation import preview, worker_messages
from kedge.evaluation.changes import Change, OutputChange
from kedge.report import document, report_files
from kedge.report.html import plots, readable_bytes, render
from kedge.search.results import Attempt
from kedge.search.worker_messages import ChangesAnswer, ShownChange

LATENCY = worker_messages.Latency(p50=1.5, p95=2.5)
GOLDEN = worker_messages.GoldenAnswer(samples=16, kernel_sets=("one", "two"), tolerances={"y": [0.1, 0.01]})


def attempt(precision: str, **changes: object) -> Attempt:
    given: dict[str, object] = {"value": 0.9, "drop": 0.05, "size_bytes": 500, "latency_ms": LATENCY}
    return Attempt(backend="b", precision=precision, **{**given, **changes})  # type: ignore[arg-type]


def sample(**changes: object) -> document.Report:
    bundle = document.BundleEntry(
        target="rpi4",
        backend="b",
        precision="float16",
        value=0.94,
        drop=0.01,
        size_bytes=700,
        size_ratio=0.7,
        latency_ms=LATENCY,
        verified="executed",
        digest="sha256:" + "a" * 64,
        calibration_samples=10,
        evaluation_samples=20,
        measured_on="runtime 1.0",
        memory_bytes=1000,
        golden=GOLDEN,
        agreement=None,
        attempts=[attempt("int8", reason="dropped by 0.05, allowed are 0.01"), attempt("float16", value=0.94)],
    )
    made = document.Report(
        model=document.ModelEntry(file="m.onnx", digest="sha256:" + "b" * 64, size_bytes=1000, name="m", version="1"),
        metric="top1",
        max_drop=0.01,
        reference=document.ReferenceEntry(value=0.95, size_bytes=1000, samples=20, latency_ms=LATENCY),
        bundles=[bundle],
        failures=[document.FailureEntry(target="odd", kind="CompileError", error="a <b> & c", attempts=[])],
        warnings=["mind the gap"],
        tools={"kedge": "0"},
        seconds={"total": 1.0},
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_json_holds_at_least_what_programs_rely_on(tmp_path: Path) -> None:
    report_files.write(sample(), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text())
    assert {"model", "metric", "reference", "bundles"} <= data.keys()
    assert data["reference"].keys() >= {"value", "size_bytes"}
    assert data["bundles"][0].keys() >= {
        "target",
        "backend",
        "precision",
        "value",
        "drop",
        "size_bytes",
        "latency_ms",
        "verified",
        "digest",
        "calibration_samples",
        "evaluation_samples",
    }
    assert data["bundles"][0]["latency_ms"] == {"p50": 1.5, "p95": 2.5}


def test_json_is_read_back_as_it_was(tmp_path: Path) -> None:
    report_files.write(sample(), tmp_path)
    assert report_files.read(tmp_path) == sample()
    assert report_files.read(tmp_path / "elsewhere") is None


class Sources(html.parser.HTMLParser):
    """Whatever a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [
            f"{tag} {name}"
            for name, value in attrs
            if name in ("src", "href", "srcset", "data") and not (value or "").startswith("data:image/png;base64,")
        ]
        self.found += [tag] if tag in ("script", "link", "iframe") else []


def test_the_page_loads_nothing() -> None:
    sources = Sources()
    page = render(sample())
    sources.feed(page)
    assert sources.found == []
    assert "url(" not in page
    assert "@import" not in page


def changed() -> document.Report:
    """A report whose bundle moved two samples: a picture, and a sound with a text."""
    before = OutputChange(name="scores", before="1 (0.9)", after="2 (0.5), 1 (<0.4)", same=0.0, error=0.7)
    picture = preview.of({"image": np.zeros((16, 16, 3), dtype=np.uint8)})
    sound = preview.of({"wave": np.sin(np.arange(4000.0)), "words": np.asarray(["<b>yes</b>"])})
    made = sample()
    answer = ChangesAnswer(
        changes=(
            ShownChange(change=Change(sample=3, outputs=(before,), layer="conv/1"), previews=picture),
            ShownChange(change=Change(sample=5, outputs=(dataclasses.replace(before, same=1.0),)), previews=sound),
        ),
        note="the time was up",
    )
    return dataclasses.replace(made, bundles=[dataclasses.replace(made.bundles[0], changes=answer)])


def test_the_page_shows_the_samples_that_changed_most(tmp_path: Path) -> None:
    page = render(changed())
    sources = Sources()
    sources.feed(page)
    assert sources.found == []
    for text in (
        "sample 3",
        "another answer",
        "1 (0.9)",
        "conv/1",
        "the time was up",
        "data:image/png",
        "&lt;b&gt;yes",
    ):
        assert text in page
    assert page.count("another answer") == 1
    report_files.write(changed(), tmp_path)
    assert report_files.read(tmp_path) == changed()


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_a_desk_and_a_telephone(tmp_path: Path, width: int) -> None:
    made = changed()
    bundle = dataclasses.replace(
        made.bundles[0], target="a-target-of-a-rather-long-name", label="split-outliers + equalize + int8, mixed"
    )
    long = dataclasses.replace(made.model, file="a_file_whose_name_has_no_place_to_break_" * 3 + ".onnx")
    page = render(dataclasses.replace(made, model=long, bundles=[bundle] * 2))
    # A frame of that width: headless Chromium makes no window below 500 pixels. Tables scroll in a box of their own.
    frame = (
        f"<title></title><iframe width={width} height=3000 srcdoc='{html.escape(page)}' onload=\"const d = "
        "this.contentDocument, w = this.contentWindow.innerWidth; document.title = w + ': ' + "
        "[...d.querySelectorAll('body > *')].filter(e => e.getBoundingClientRect().right > w || "
        "(e.scrollWidth > e.clientWidth + 1 && e.className != 'scroll')).map(e => e.outerHTML.slice(0, 80)).join()\">"
    )
    file = tmp_path / "frame.html"
    file.write_text(frame, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --dump-dom"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path}/profile", "--window-size=1400,3200"]
    done = subprocess.run([*command, file.as_uri()], capture_output=True, text=True, timeout=300, check=True)
    title = html.unescape(done.stdout.partition("<title>")[2].partition("</title>")[0])
    assert re.fullmatch(r"(\d+): ", title), title
    assert int(title.split(":")[0]) in range(width - 20, width + 1)


def test_the_page_says_what_the_report_says() -> None:
    page = render(sample())
    for text in ("rpi4", "float16", "0.9400", "0.70×", "dropped by 0.05", "mind the gap", "a &lt;b&gt; &amp; c", "odd"):
        assert text in page


def test_plots_show_metric_size_and_latency_by_target_and_precision() -> None:
    drawn = plots(sample())
    assert [plot.title.split()[0] for plot in drawn] == ["Metric", "Size", "Latency"]
    for plot in drawn:
        assert [bar.label for bar in plot.bars] == ["float model", "rpi4 int8", "rpi4 float16"]
        assert [bar.faded for bar in plot.bars] == [False, True, False]
    size = drawn[1].bars
    assert size[1].width == pytest.approx(size[0].width / 2)


def test_the_plots_are_well_formed() -> None:
    page = render(sample())
    pieces = page.split("<svg")[1:]
    assert len(pieces) == 3
    for piece in pieces:
        ElementTree.fromstring("<svg" + piece.partition("</svg>")[0] + "</svg>")


def test_bars_have_no_negative_width() -> None:
    worst = dataclasses.replace(sample().bundles[0], attempts=[attempt("int8", value=-0.5)])
    assert plots(sample(bundles=[worst]))[0].bars[1].width == 0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 KB"), (312824, "313 KB"), (2.5e6, "2.5 MB")]
)
def test_bytes_are_readable(count: float, text: str) -> None:
    assert readable_bytes(count) == text
