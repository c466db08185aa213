"""Writes a compiled target as a bundle, without anything that differs from run to run (times, paths, memory)."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from kedge.search import recipe
from kedge.search.results import Compiled, ReleaseSource
from kedge_protocol import __version__, digest
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.pipeline import Pipeline
from kedge_protocol.bundle.write import LayoutWriter
from kedge_targets import registry
from kedge_targets.pipeline import examples

GOLDEN_FILE = "golden.npz"


def configuration(compiled: Compiled, source: ReleaseSource) -> cfg.BundleConfig:
    """Return the bundle's configuration."""
    lowered, evaluation = compiled.lowered, compiled.evaluation
    uses_calibration = lowered.calibration_samples > 0
    storage = sum(Path(path).stat().st_size for path in lowered.files.values())
    return cfg.BundleConfig(
        schema_version=cfg.SCHEMA_VERSION,
        name=source.options.name,
        version=source.options.version,
        target=compiled.target.name,
        backend=compiled.candidate.backend.name,
        entry=lowered.entry,
        precision=compiled.precision,
        runtimes=lowered.runtimes,
        runtime_options=lowered.runtime_options,
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        labels=source.labels,
        states=tuple(cfg.State(input=name, output=output) for name, output in source.model.states.items()),
        pipeline=_pipeline(compiled, source),
        metric=cfg.Metric(
            name=source.reference.choice.name,
            value=evaluation.value,
            reference=source.reference.value,
            agreement=evaluation.agreement,
            samples=source.evaluation_samples,
            measured_on=f"{evaluation.runtime}, {platform.machine()}",
        ),
        resources=cfg.Resources(
            storage_bytes=storage,
            # The files as read and as the runtime packs them anew, and every tensor of one sample.
            memory_bytes=2 * storage + source.model.activation_bytes,
        ),
        provenance=cfg.Provenance(
            model_digest=source.model.digest,
            calibration_digest=source.calibration_digest if uses_calibration else None,
            evaluation_digest=source.evaluation_digest,
            calibration_samples=lowered.calibration_samples,
            evaluation_samples=source.evaluation_samples,
            tools={**source.tools, **source.reference.tools, **lowered.tools, "kedge": __version__},
            options=_options(compiled, source),
        ),
        verified=lowered.verified,
        golden=cfg.GoldenRef(
            file=GOLDEN_FILE,
            digest=digest.of_file(compiled.golden_file),
            samples=compiled.golden.samples,
            kernel_sets=compiled.golden.kernel_sets,
        ),
        drift=compiled.golden.drift or None,
    )


def _pipeline(compiled: Compiled, source: ReleaseSource) -> Pipeline | None:
    if source.pipeline is None or compiled.larger is None:
        return source.pipeline
    return replace(source.pipeline, cascade=compiled.larger)


def _options(compiled: Compiled, source: ReleaseSource) -> dict[str, Any]:
    """Return the requested options and the recipe that reproduces this bundle."""
    backend = compiled.candidate.backend
    section = recipe.section_of(compiled.candidate, registry.compiler(backend.name), compiled.target)
    asked: dict[str, Any] = {"max_drop": source.budget.max_drop, "backend": backend.options, "seed": source.seed}
    others = ("max_size", "max_latency", "min_agreement")
    asked |= {name: value for name in others if (value := getattr(source.budget, name))}
    return {**asked, "recipe": recipe.plain(section)}


def add(writer: LayoutWriter, compiled: Compiled, source: ReleaseSource) -> oci.Descriptor:
    """Add the bundle to a layout and return its descriptor, whose digest identifies the bundle.

    Raises:
        BundleError: a backend's file has a title that is not a plain file name.
    """
    files = {title: Path(path) for title, path in compiled.lowered.files.items()} | source.pipeline_files
    if compiled.examples is not None:
        files[examples.FILE] = compiled.examples
    return writer.add_bundle(configuration(compiled, source), files, compiled.golden_file)
