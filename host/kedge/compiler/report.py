"""The report of a compilation: ``report.json`` for programs, ``report.html`` for people. Both lie in OUT beside the
layout and are part of no digest."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.compiler import exchange
from kedge.compiler.ladder import Attempt, Compiled, Failed
from kedge.compiler.pack import Source
from kedge_protocol import __version__, codec

JSON_FILE = "report.json"
HTML_FILE = "report.html"


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The user's model; ``file`` without its folder."""

    file: str
    digest: str
    size_bytes: int
    name: str
    version: str


@dataclass(frozen=True, kw_only=True)
class ReferenceEntry:
    """The float model run by ONNX Runtime."""

    value: float
    size_bytes: int
    samples: int
    latency_ms: exchange.Latency


@dataclass(frozen=True, kw_only=True)
class BundleEntry:
    """One bundle, measured on the very files that the device gets.

    Attributes:
        drop: reference minus value.
        size_bytes: of the files that the device needs (golden vectors not counted).
        size_ratio: of that to the model's file.
        memory_bytes: the process's growth on load and first call, as measured here.
        attempts: all that was tried; the last one was taken.
    """

    target: str
    backend: str
    precision: str
    value: float
    drop: float
    size_bytes: int
    size_ratio: float
    latency_ms: exchange.Latency
    verified: str
    digest: str
    calibration_samples: int
    evaluation_samples: int
    measured_on: str
    memory_bytes: int
    golden: exchange.GoldenAnswer
    agreement: float | None = None
    tools: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FailureEntry:
    """A target without a bundle, and why."""

    target: str
    kind: str
    error: str
    attempts: list[Attempt] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that a compilation told.

    Attributes:
        metric: ``top1``, ``agreement``, ``cosine`` or the user's ``file.py:function``.
        seconds: wall-clock spans of the whole command.
    """

    model: ModelEntry
    metric: str
    max_drop: float
    reference: ReferenceEntry
    bundles: list[BundleEntry]
    failures: list[FailureEntry]
    warnings: list[str]
    tools: dict[str, str]
    seconds: dict[str, float]


def of(
    file: str,
    source: Source,
    compiled: list[Compiled],
    digests: list[str],
    failed: list[Failed],
    latency: exchange.Latency,
    warnings: list[str],
    seconds: dict[str, float],
) -> Report:
    """Put a report together.

    Args:
        file: the model's file name.
        digests: of the bundles, in the order of ``compiled``.
        latency: of the float model.
        warnings: so far; fallbacks are added.
    """
    reference, options = source.reference, source.options
    return Report(
        model=ModelEntry(
            file=file,
            digest=source.model.digest,
            size_bytes=source.model.size_bytes,
            name=options.name,
            version=options.version,
        ),
        metric=reference.choice.name,
        max_drop=options.max_drop,
        reference=ReferenceEntry(
            value=reference.value,
            size_bytes=source.model.size_bytes,
            samples=source.evaluation_samples,
            latency_ms=latency,
        ),
        bundles=[_bundle(one, digest, source) for one, digest in zip(compiled, digests, strict=True)],
        failures=[
            FailureEntry(
                target=one.target.name, kind=type(one.error).__name__, error=str(one.error), attempts=one.attempts
            )
            for one in failed
        ],
        warnings=warnings + [text for one in compiled for text in _fallbacks(one)],
        tools={**reference.tools, "kedge": __version__, "python": platform.python_version()},
        seconds=seconds,
    )


def _bundle(compiled: Compiled, digest: str, source: Source) -> BundleEntry:
    attempt, evaluation = compiled.attempt, compiled.evaluation
    size = attempt.size_bytes or 0
    return BundleEntry(
        target=compiled.target.name,
        backend=compiled.backend.name,
        precision=compiled.precision.value,
        value=evaluation.value,
        drop=source.reference.value - evaluation.value,
        agreement=evaluation.agreement,
        size_bytes=size,
        size_ratio=size / max(1, source.model.size_bytes),
        latency_ms=compiled.latency,
        verified=compiled.lowered.verified.value,
        digest=digest,
        calibration_samples=compiled.lowered.calibration_samples,
        evaluation_samples=source.evaluation_samples,
        measured_on=evaluation.runtime,
        memory_bytes=evaluation.memory_bytes,
        golden=compiled.golden,
        tools=compiled.lowered.tools,
        notes=compiled.lowered.notes,
        attempts=compiled.attempts,
    )


def _fallbacks(compiled: Compiled) -> list[str]:
    """One warning for each attempt that was not taken."""
    taken = f"{compiled.backend.name} {compiled.precision.value} was taken"
    return [
        f"{compiled.target.name}: {f'{a.backend} {a.precision}'.strip()}: {a.reason.splitlines()[0]}; {taken}"
        for a in compiled.attempts[:-1]
    ]


def write(report: Report, folder: Path) -> None:
    """Write both files into ``folder``."""
    plain: Any = codec.unstructure(report)
    (folder / JSON_FILE).write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    from kedge.compiler.report_html import render

    (folder / HTML_FILE).write_text(render(report), encoding="utf-8")


def read(folder: Path) -> Report | None:
    """The report of a release folder; None where there is none (a copied layout)."""
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    return codec.decode(path.read_bytes(), Report, where=str(path))
