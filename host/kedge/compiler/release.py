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
        candidates: target → views of its bundles (``config``, ``digest``, ``files``, ``model_bytes``), the preferred
            one first: one, or one of each backend (``every_backend``).
        report: the measurements; None for a folder without a report.
        generation: the measurements of a language model; None for all others.
        failures: target → error, for requested targets without a bundle. :func:`kedge.compile` raises only if no
            target could be compiled: check this if all are needed.
    """

    path: Path
    name: str
    version: str
    digest: str
    candidates: Mapping[str, tuple[Bundle, ...]]
    report: Report | None = None
    generation: DecoderReport | None = None
    failures: Mapping[str, KedgeError] = field(default_factory=dict)

    @property
    def bundles(self) -> dict[str, Bundle]:
        """Target → view of the bundle that the compiler prefers."""
        return {target: several[0] for target, several in self.candidates.items()}

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
            candidates={target: layout.candidates(target) for target in view.candidates},
            report=read(Path(path)),
            generation=decoders.read(Path(path)),
        )
