"""Reads checkpoints (``best.pt``) as ONNX graphs, with the names, stride and task that ``yolo export`` writes."""

from __future__ import annotations

from pathlib import Path

from kedge_targets import importer
from kedge_targets.importer import Read, ReadAnswer, ReadRequest
from kedge_targets.toolchain import declaration
from kedge_targets.toolchain.client import ToolchainClient

_START_SECONDS = 300.0
_READ_SECONDS = 1800.0


class Importer(importer.Importer):
    """Reads a checkpoint. It is a pickle: reading it runs code, which only the user can allow."""

    reads = ("Ultralytics' .pt (with --trust-pickle)",)
    metadata = ("task", "names", "stride", "imgsz", "end2end")

    def kind(self, path: Path) -> str | None:
        """See :meth:`kedge_targets.importer.Importer.kind`. The name does not tell; the caller has looked inside."""
        return "Ultralytics checkpoint" if path.suffix.lower() == ".pt" else None

    def read(self, path: Path, graph: Path) -> Read:
        """See :meth:`kedge_targets.importer.Importer.read`. The graph takes one picture at a time, of the size that the
        network was trained on."""
        client = ToolchainClient(declaration.ULTRALYTICS, start_seconds=_START_SECONDS)
        answer = client.call(
            "read", ReadRequest(model=str(path), graph=str(graph)), ReadAnswer, deadline=_READ_SECONDS, where=str(path)
        )
        return Read(notes=answer.notes, tools=answer.packages)
