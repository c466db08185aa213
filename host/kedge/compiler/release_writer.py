"""Writes a release: bundles, report, recipe, and the record of the search."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path

from kedge.compiler import bundle_writer
from kedge.compiler.release import Release
from kedge.report import document, report_files
from kedge.search import latency, recipe
from kedge.search.latency import Measurement
from kedge.search.options import CompileOptions
from kedge.search.results import Compiled, Failed, ReleaseSource
from kedge_protocol.bundle.write import is_replaceable, new_layout
from kedge_targets import registry

RECORD_FILE = "search.json"


def release(
    options: CompileOptions,
    source: ReleaseSource,
    compiled: list[Compiled],
    failed: list[Failed],
    told: document.RunInfo,
    measurements: Sequence[Measurement],
    *,
    out: Path | None = None,
) -> Release:
    """Write the release folder OUT, completely or not at all.

    Args:
        out: a folder other than that in the options.
    """
    began = time.perf_counter()
    with new_layout(out or options.out, replace=options.force or out is not None) as writer:
        made = [each for one in compiled for each in (one, *one.alternatives)]
        digests = [bundle_writer.add(writer, one, source).digest for one in made]
        digest = writer.add_release(options.name, options.version).digest
        told.seconds["pack"] = time.perf_counter() - began
        told.seconds["total"] = time.perf_counter() - told.began
        report = document.of(told, source, compiled, digests, failed)
        report_files.write(report, writer.path)
        (writer.path / recipe.FILE).write_text(_recipe(options, source, compiled), encoding="utf-8")
        (writer.path / RECORD_FILE).write_text(latency.written(measurements), encoding="utf-8")
    return Release(
        path=out or options.out,
        name=options.name,
        version=options.version,
        digest=digest,
        candidates=writer.candidates,
        report=report,
        failures={one.target.name: one.error for one in failed},
    )


def nearest(out: Path, source: ReleaseSource, failed: list[Failed], told: document.RunInfo) -> Path | None:
    """Write the nearest results into a folder beside OUT if no target meets the budget, so that no result is lost. A
    release of that name is replaced; anything else stays, and the next free name is used. Return None if nothing was
    found."""
    kept = [one.nearest for one in failed if one.nearest is not None]
    if not kept:
        return None
    return release(source.options, source, kept, failed, told, (), out=_free_place(out)).path


def _free_place(out: Path) -> Path:
    names = itertools.chain([f"{out.name}.nearest"], (f"{out.name}.nearest-{again}" for again in itertools.count(2)))
    places = map(out.with_name, names)
    return next(place for place in places if not os.path.lexists(place) or is_replaceable(place))


def _recipe(options: CompileOptions, source: ReleaseSource, compiled: list[Compiled]) -> str:
    sections = {}
    heading = [f"How {options.name} {options.version} was compressed. Edit it, and run it again with --recipe."]
    for one in compiled:
        compiler = registry.compiler(one.candidate.backend.name)
        sections[one.target.name] = recipe.section_of(one.candidate, compiler, one.target)
        heading.append(f"{one.target.name}: {one.candidate.label}: {one.candidate.why}.")
        heading += [f"  {layer}: {why}" for layer, why in one.candidate.reasons.items()]
    return recipe.written(sections, seed=source.seed, heading=heading)
