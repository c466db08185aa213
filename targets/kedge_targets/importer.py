"""The contract of an importer: a backend that can read its vendor's trained models as ONNX graphs.

``backends/<name>/importer.py`` with a class ``Importer``, on the host only; :func:`kedge_targets.registry.importers`
finds them. As with the other halves of a backend, nothing of the vendor's is imported at the top.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Read:
    """The result of reading a model.

    Attributes:
        notes: what was decided, for people.
        tools: package → version.
    """

    notes: tuple[str, ...]
    tools: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """The task ``read`` of a toolchain's driver: read ``model``, write ``graph``."""

    model: str
    graph: str


@dataclass(frozen=True, kw_only=True)
class ReadAnswer:
    """What the driver read.

    Attributes:
        notes: messages for the user.
        packages: package → version, of those that read the model.
    """

    notes: tuple[str, ...]
    packages: dict[str, str]


class Importer(abc.ABC):
    """Reads models of one vendor."""

    reads: tuple[str, ...]
    """What it reads, in words (``.tflite``)."""
    metadata: tuple[str, ...] = ()
    """Keys of the graph's metadata that say what the model is, and stay; others (dates, licences) go."""

    @abc.abstractmethod
    def kind(self, path: Path) -> str | None:
        """Return the kind of this file or folder; None if it is none of its own. Only names are inspected."""

    @abc.abstractmethod
    def read(self, path: Path, graph: Path) -> Read:
        """Write an ONNX graph that was seen to compute what the model computes: axes, layouts and names of inputs and
        outputs as the model has them, free axes free.

        Raises:
            ModelError: broken, quantized already, or the graph computes something else.
            UnsupportedOperatorError: names the operator and its node.
            ToolchainError: its toolchain is not installed.
        """
