"""Tells what a backend cannot take, whatever the candidate."""

from __future__ import annotations

from kedge.evaluation.model import Model
from kedge_protocol.bundle.config import TEXT
from kedge_protocol.errors import KedgeError, LoweringError, MissingDependencyError
from kedge_targets import registry
from kedge_targets.target import BackendChoice, Target


def unable(choice: BackendChoice, model: Model, target: Target) -> KedgeError | None:
    """Return why a backend cannot take a model on this host; None where it can."""
    compiler = registry.compiler(choice.name)
    missing = compiler.missing()
    if missing is not None:
        return MissingDependencyError(f"backend {choice.name} is not installed", remedy=missing)
    texts = [info.name for info in model.inputs if info.dtype == TEXT]
    if texts and not compiler.texts:
        return LoweringError(
            f"input {texts[0]!r} takes texts, and the runtime of {choice.name} has no tensors of texts",
            where=f"target {target.name}",
            remedy="Export the part behind the encoder or vectorizer and give it numbers, or choose a target with "
            "ONNX Runtime, such as generic-cpu",
        )
    return None
