"""Reads TensorFlow's SavedModels and float ``.tflite`` files as ONNX graphs with tf2onnx, in the toolchain."""

from __future__ import annotations

from pathlib import Path

from kedge_targets import importer
from kedge_targets.backends.tflite import toolchain_client
from kedge_targets.importer import Read, ReadAnswer, ReadRequest

_SAVED_MODEL = ("saved_model.pb", "saved_model.pbtxt")


class Importer(importer.Importer):
    """Reads models with tf2onnx; the driver runs model and graph on the same noise and refuses a graph whose results
    differ."""

    reads = ("a TensorFlow SavedModel folder", ".tflite (float)")

    def kind(self, path: Path) -> str | None:
        """See :meth:`kedge_targets.importer.Importer.kind`."""
        if path.is_dir():
            return "TensorFlow SavedModel" if any((path / name).is_file() for name in _SAVED_MODEL) else None
        return "TFLite model" if path.suffix.lower() == ".tflite" else None

    def read(self, path: Path, graph: Path) -> Read:
        """See :meth:`kedge_targets.importer.Importer.read`."""
        answer = toolchain_client.ask("read", ReadRequest(model=str(path), graph=str(graph)), ReadAnswer)
        return Read(notes=answer.notes, tools=answer.packages)
