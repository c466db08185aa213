"""Prints the results of ``kedge compile`` for a language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedge.compiler.decoders.splitting import part_folder, part_name

if TYPE_CHECKING:
    from rich.console import Console

    from kedge.compiler.decoders.report import DecoderReport

_MIB = 1 << 20


def show(console: Console, path: Path, digest: str, report: DecoderReport) -> None:
    """Print the table of a release's targets, its warnings and its folder."""
    from rich.table import Table

    reference = report.targets[0].attempt.figures.reference
    table = Table(title=f"{report.name} {report.version}: perplexity of the {_judge(report)} {reference:.4g}")
    for column in ("target", "backend", "how"):
        table.add_column(column)
    for column in ("perplexity", "×", "KL", "same top", "MiB", "memory MiB", "context"):
        table.add_column(column, justify="right")
    table.add_column("digest")
    for one in report.targets:
        figures = one.attempt.figures
        part = "" if one.layers is None else f", layers {one.layers[0]} to {one.layers[1] - 1}"
        table.add_row(
            one.target + part,
            one.backend,
            one.attempt.label,
            f"{figures.perplexity:.4g}",
            f"{figures.ratio:.4f}",
            f"{figures.kl:.4f}",
            f"{figures.agreement:.3f}",
            f"{one.bytes / _MIB:.1f}",
            f"{one.memory_bytes / _MIB:.0f}",
            f"{one.slots} × {one.context}",
            one.digest[:19],
        )
    for name, error in (report.failures or {}).items():
        table.add_row(name, "", f"failed: {error}")
    console.print(table)
    for step in report.targets[0].steps:
        weights = f"{step.parameters / 1e6:.3g} million weights"
        console.print(f"after {step.use}: {weights}, {step.figures.said}", soft_wrap=True, markup=False)
    for one in report.targets:
        console.print(f"{one.target}: {one.attempt.figures.said}", soft_wrap=True, markup=False)
        for pace in one.paces:
            console.print(f"{one.target}: {pace.said}", soft_wrap=True, markup=False)
        if one.choices is not None:
            console.print(f"{one.target}: {one.choices.said}", soft_wrap=True, markup=False)
        if one.written_per_second is not None:
            console.print(f"{one.target}: writes {one.written_per_second:.3g} tokens a second", markup=False)
        for attempt in () if one.layers is not None and one.layers[0] else one.attempts:
            if attempt.broken:
                console.print(f"{one.target}: {attempt.label}: {attempt.broken}", soft_wrap=True, markup=False)
    for warning in report.warnings:
        console.print(f"warning: {warning}", soft_wrap=True, markup=False)
    console.print(f"{path}: release {digest}", soft_wrap=True, markup=False)
    for index in range(1, sum(one.layers is not None for one in report.targets)):
        further = (
            f"{part_folder(path.parent, index)}: {part_name(report.name, index)}, for the device with part {index + 1}"
        )
        console.print(further, soft_wrap=True, markup=False)


def _judge(report: DecoderReport) -> str:
    """Return what the figures are relative to, in words."""
    teachers = [step.options["teacher"] for step in report.targets[0].steps if step.options.get("teacher") is not None]
    return f"teacher {Path(str(teachers[0])).name}" if teachers else "float model"
