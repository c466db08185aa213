"""``kedge compile``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kedge.cli import decoder_table, progress
from kedge.compiler.service import run
from kedge.compiler.validation import check_environment
from kedge.options import command_line, made
from kedge.search.options import CompileOptions

if TYPE_CHECKING:
    from kedge.compiler.release import Release
    from kedge.report.document import BundleEntry

SOME_FAILED = 3
"""Exit status if some targets have a bundle and others do not."""
_PLAIN_WIDTH = 140


@click.command("compile")
@click.argument("model", metavar="MODEL")
@command_line(CompileOptions)
def compile_command(model: str, **values: Any) -> int:
    """Compile MODEL into a release: one bundle for each target, the smallest and fastest within the budget, measured
    with the device's runtime.

    MODEL: an .onnx file, a PyTorch program (.pt2, or FILE.py:FACTORY), a .keras file, a SavedModel, a float .tflite, a
    language model (a folder with config.json and safetensors, a .gguf, or an .onnx with past and present).

    Exit status: 0 if every target has its bundle, 3 if some failed (the others are written), 1 on an error.
    """
    check_environment()  # before anything of the extra is imported
    with progress.progress_display() as on_progress:
        release = run(model, made(CompileOptions, values), on_progress=on_progress)
    _show(release)
    return SOME_FAILED if release.failures else 0


def _show(release: Release) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PLAIN_WIDTH)
    if release.generation is not None:
        decoder_table.show(console, release.path, release.digest, release.generation)
        return
    report = release.report
    if report is None:
        return
    metric = report.metric
    teacher = report.reference.teacher
    judge = "float model" if teacher is None else f"teacher {teacher}"
    table = Table(title=f"{release.name} {release.version}: {metric} of the {judge} {report.reference.value:.4f}")
    for column in ("target", "backend", "how"):
        table.add_column(column)
    for column in (metric, "drop", "size ×", "int %", "p50 ms"):
        table.add_column(column, justify="right")
    table.add_column("verified")
    table.add_column("digest")
    for bundle in report.bundles:
        table.add_row(*_cells(bundle))
    for failure in report.failures:
        table.add_row(failure.target, "", "failed")
    console.print(table)
    for bundle in report.bundles:
        console.print(f"{bundle.name}: drop {_ends(bundle)}{bundle.promise}", soft_wrap=True, markup=False)
        for remark in bundle.remarks:
            console.print(f"{bundle.name}: {remark}", soft_wrap=True, markup=False)
    for target, several in release.candidates.items():
        if len(several) > 1:
            backends = ", ".join(one.config.backend for one in several)
            console.print(f"{target}: its devices choose among {backends} by measuring", soft_wrap=True, markup=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    for failure in report.failures:
        click.echo(f"error: {failure.target}: {failure.error}", err=True)
    console.print(f"{release.path}: release {release.digest}", soft_wrap=True, markup=False)
    console.print(f"{release.path / 'report.html'}", soft_wrap=True, markup=False)


def _ends(bundle: BundleEntry) -> str:
    """Return text like ``-0.0012 to 0.0051, ``, or nothing if there is no interval."""
    return "" if bundle.interval is None else f"{bundle.interval.low:.4f} to {bundle.interval.high:.4f}, "


def _latency(bundle: BundleEntry) -> str:
    """Return the milliseconds on the target; ``~`` precedes an estimate."""
    known = bundle.target_latency
    if known is None:
        return f"{bundle.latency_ms.p50:.3g}"
    return f"{'~' if known.estimated else ''}{known.p50:.3g}"


def _integers(bundle: BundleEntry) -> str:
    """Return the fractions of the weight bytes and of the multiply-accumulates in integers; empty if they were not
    counted."""
    shares = (bundle.weights_in_integers, bundle.macs_in_integers)
    if shares == (None, None):
        return ""
    return "/".join("–" if share is None else f"{100 * share:.0f}" for share in shares)


def _cells(bundle: BundleEntry) -> tuple[str, ...]:
    return (
        bundle.target,
        bundle.backend,
        bundle.label or bundle.precision,
        f"{bundle.value:.4f}",
        f"{bundle.drop:.4f}",
        f"{bundle.pulled_ratio:.2f}",
        _integers(bundle),
        _latency(bundle),
        bundle.verified,
        bundle.digest[:19],
    )
