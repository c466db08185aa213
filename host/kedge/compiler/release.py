"""A release as an object, as returned by :func:`kedge.compile`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kedge.compiler.decoders import report as decoders
from kedge.compiler.decoders.report import DecoderReport
from kedge.report.document import Report
from kedge.report.report_files import read
from kedge_protocol.bundle.layout import Bundle, Layout
from kedge_protocol.errors import KedgeError


@dataclass(frozen=True, kw_only=True)
class Release:
    """The bundles of one version, in a folder.

    Attributes:
        path: the OCI image layout.
        digest: the digest of the release's image index.
        bundles: target → view of its bundle (``config``, ``digest``, ``files``, ``model_bytes``).
        report: the measurements; None for a folder without a report.
        generation: the measurements of a language model; None for all others.
        alternatives: backend → release folder with its bundles, where they were asked for (``every_backend``).
        failures: target → error, for requested targets without a bundle. :func:`kedge.compile` raises only if no
            target could be compiled: check this if all are needed.
    """

    path: Path
    name: str
    version: str
    digest: str
    bundles: Mapping[str, Bundle]
    report: Report | None = None
    generation: DecoderReport | None = None
    failures: Mapping[str, KedgeError] = field(default_factory=dict)
    alternatives: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path | str) -> Release:
        """Read a release folder; files are not checked (see :meth:`kedge_protocol.bundle.layout.Layout.verify`).

        Raises:
            BundleError: the folder is not a release.
        """
        layout = Layout(Path(path))
        view = layout.release()
        return cls(
            path=Path(path),
            name=view.name,
            version=view.version,
            digest=view.digest,
            bundles={target: layout.read_bundle(descriptor) for target, descriptor in view.bundles.items()},
            report=read(Path(path)),
            generation=decoders.read(Path(path)),
        )
