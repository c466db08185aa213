"""Writes the releases of a decoder that is split: one for each part, a model of its own in the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kedge.compiler.decoders import report
from kedge.compiler.decoders.splitting import part_folder, part_name
from kedge.compiler.decoders.worker_messages import DecoderAnswer
from kedge.compiler.release import Release
from kedge.search.options import CompileOptions
from kedge_protocol import digest
from kedge_protocol.bundle.config import BundleConfig, Resources
from kedge_protocol.bundle.generation import Part
from kedge_protocol.bundle.write import new_layout
from kedge_targets.target import Target

WHOLE = "whole.npz"
"""The golden vectors of all parts together, in the first part's bundle."""


def write(options: CompileOptions, holders: Sequence[Target], base: BundleConfig, answer: DecoderAnswer) -> Release:
    """Write the releases, the last part's first, because each part names the digest of the next one; return the first
    part's.

    Args:
        holders: the target of each part.
        base: the configuration of the whole.
    """
    following: str | None = None
    entries: list[report.DecoderEntry] = []
    options.out.mkdir(parents=True, exist_ok=True)
    for index in reversed(range(len(holders))):
        holder, part = holders[index], answer.parts[index]
        files = {title: Path(path) for title, path in part.files.items()}
        if index == 0:
            files |= {title: Path(path) for title, path in answer.files.items()} | {WHOLE: Path(answer.golden)}
        config = _configuration(base, holder, answer, index, files, following)
        with new_layout(part_folder(options.out, index), replace=options.force) as writer:
            following = writer.add_bundle(config, files, Path(part.golden)).digest
            writer.add_release(config.name, config.version)
            whole = report.entry(answer, holder.name, following)
            own = replace(whole, bytes=part.bytes, memory_bytes=part.memory_bytes, layers=part.layers)
            own = replace(own, position_bytes=part.position_bytes, window_bytes=part.window_bytes)
            entries.insert(0, own)
            if index == 0:
                report.write(
                    report.DecoderReport(
                        name=options.name,
                        version=options.version,
                        source_bytes=answer.source_bytes,
                        targets=tuple(entries),
                        warnings=answer.warnings,
                    ),
                    writer.path,
                )
    return Release.open(part_folder(options.out, 0))


def _configuration(
    base: BundleConfig,
    holder: Target,
    answer: DecoderAnswer,
    index: int,
    files: dict[str, Path],
    following: str | None,
) -> BundleConfig:
    part = answer.parts[index]
    first = index == 0
    held = Part(
        index=index,
        count=len(answer.parts),
        layers=part.layers,
        channels=answer.channels,
        following=following,
        whole=WHOLE if first else None,
    )
    written = answer.generation
    return replace(
        base,
        name=part_name(base.name, index),
        target=holder.name,
        entry=part.entry,
        runtimes=part.runtimes,
        runtime_options=dict(next(one for one in holder.backends if one.name == base.backend).options),
        resources=Resources(
            storage_bytes=sum(path.stat().st_size for path in files.values()), memory_bytes=part.memory_bytes
        ),
        golden=replace(base.golden, digest=digest.of_file(Path(part.golden))),
        generation=replace(
            written,
            position_bytes=part.position_bytes,
            window_bytes=part.window_bytes,
            part=held,
            tokenizer=written.tokenizer if first else "",
            template=written.template if first else None,
        ),
    )
