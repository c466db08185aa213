"""Renders ``report.html``: one file without scripts or external resources; the plots are inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kedge.evaluation.outputs import EXACT_DB
from kedge.report.document import LayerEntry, Report
from kedge.report.plots import front_plot, resource_plot
from kedge.search.results import Attempt

_FOLDER = Path(__file__).parent
_COLOURS = {"int8": "#2563eb", "float16": "#0d9488", "float32": "#a16207", "reference": "#6b7280"}
_OTHER = "#7c3aed"
_WIDTH = 340.0  # of the longest bar, in the SVG's own units
_ROW = 26
_MANY = 4


@dataclass(frozen=True)
class Bar:
    """One bar of a plot; ``width`` in the SVG's units."""

    label: str
    value: str
    width: float
    colour: str
    y: int
    faded: bool


@dataclass(frozen=True)
class Plot:
    """One plot; ``height`` in the SVG's units."""

    title: str
    bars: tuple[Bar, ...]
    height: int


def render(report: Report) -> str:
    """Render the page."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["bytes"] = readable_bytes
    environment.filters["db"] = readable_db
    environment.filters["figure"] = lambda value: "–" if value is None else f"{value:.4f}"
    environment.filters["share"] = readable_share
    environment.filters["alike"] = alike
    return environment.get_template("report.html.j2").render(
        report=report,
        plots=plots(report),
        fronts=[one for entry in _tried(report) if (one := front_plot.plot(*entry)) is not None],
        resources=[
            resource_plot.plot(bundle.target, bundle.estimate)
            for bundle in report.bundles
            if bundle.estimate is not None and bundle.estimate.layers
        ],
        sensitivity=sensitivity(report),
    )


def alike(layers: Sequence[LayerEntry]) -> list[list[LayerEntry]]:
    """Group layers with the same precision for the same reason, in the order of the first of each."""
    found: dict[tuple[str, str], list[LayerEntry]] = {}
    for layer in layers:
        found.setdefault((layer.precision, layer.why), []).append(layer)
    return list(found.values())


def sensitivity(report: Report) -> object | None:
    """The plot of what each layer suffers, with the choice that was made for it; of several targets the first whose
    plan names layers."""
    if report.sensitivity is None or not report.sensitivity.layers:
        return None
    from kedge.report.plots import sensitivity_plot

    named = next((bundle for bundle in report.bundles if bundle.layers), None)
    chosen = {layer.name: layer.precision for layer in named.layers} if named else {}
    default = (named or report.bundles[0]).attempts[-1].precision if report.bundles else ""
    names = [layer.name for layer in report.sensitivity.layers]
    return sensitivity_plot.plot(report.sensitivity, {name: chosen.get(name, default) for name in names})


def _tried(report: Report) -> list[tuple[str, list[Attempt]]]:
    made = [(bundle.target, bundle.attempts) for bundle in report.bundles if not bundle.place]
    return made + [(failure.target, failure.attempts) for failure in report.failures]


def plots(report: Report) -> list[Plot]:
    """Metric, size and latency by target and precision; what was tried and not taken is faded."""
    tried = [(target, attempt) for target, attempts in _tried(report) for attempt in _few(attempts)]
    reference = report.reference
    return [
        _plot(f"Metric ({report.metric})", reference.value, tried, lambda a: a.value, lambda v: f"{v:.4f}"),
        _plot("Size", float(reference.size_bytes), tried, lambda a: a.size_bytes, readable_bytes),
        _plot(
            "Latency p50, one sample, on the host",
            reference.latency_ms.p50,
            tried,
            lambda a: None if a.latency_ms is None else a.latency_ms.p50,
            lambda v: f"{v:.3g} ms",
        ),
    ]


def _few(attempts: list[Attempt]) -> list[Attempt]:
    """All where there are few; of a long search those on the front and the one that was taken."""
    if len(attempts) <= _MANY:
        return attempts
    return [one for one in attempts if one.front or not one.reason]


def _plot(
    title: str,
    reference: float,
    tried: Sequence[tuple[str, Attempt]],
    measure: Callable[[Attempt], float | None],
    text: Callable[[float], str],
) -> Plot:
    rows = [("float model", reference, "reference", False)]
    for target, attempt in tried:
        value = measure(attempt)
        if value is not None:
            rows.append((f"{target} {attempt.precision}", float(value), attempt.precision, bool(attempt.reason)))
    largest = max((abs(value) for _, value, _, _ in rows), default=0.0) or 1.0
    bars = tuple(
        Bar(
            label,
            text(value),
            round(max(0.0, value) / largest * _WIDTH, 1),
            _COLOURS.get(kind, _OTHER),
            index * _ROW,
            faded,
        )
        for index, (label, value, kind, faded) in enumerate(rows)
    )
    return Plot(title, bars, len(bars) * _ROW)


def readable_db(value: float | None) -> str:
    """``31.4 dB``; what is exact, and what has no meaning, in words."""
    if value is None:
        return "–"
    return "exact" if value >= EXACT_DB else f"{value:.1f} dB"


def readable_share(share: float | None) -> str:
    """``98 %``; a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f} %"


def readable_bytes(count: float) -> str:
    """``312 KB``, in powers of 1000."""
    size, unit = float(count), "B"
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.3g} {unit}"
