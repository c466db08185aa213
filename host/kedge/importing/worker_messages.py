"""The worker's messages for importing a model: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """A request to turn ``source`` into an ONNX graph; made by :func:`kedge.importing.api.request`.

    Attributes:
        source: an absolute path, ``/absolute/file.py:factory`` or ``dotted.module:factory``.
        workdir: an empty folder that outlives the call; the graph is written there.
        inputs: input name → ``.npy`` file of one or two samples as the model takes them, batch axis first.
        batch: the batch size to fix in the graph; None leaves free what the source leaves free.
        folder: the user's current folder, which is searched for modules and in which a factory runs.
        trust_pickle: whether to read a file that may run code when it is read.
    """

    source: str
    workdir: str
    inputs: dict[str, str] = field(default_factory=dict)
    batch: int | None = None
    folder: str = "."
    trust_pickle: bool = False


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
        graph: the ONNX file; the user's own if the source is one and nothing had to be fixed.
        kind: the kind of the source, in words (``PyTorch module``).
        notes: the decisions made (``batch fixed to 1: …``, ``free axes: batch, sequence``).
        tools: package → version, for the packages that read and exported the model.
        source_digest: ``sha256:…`` of the user's file, of a folder's files and their names, or of a factory's file and
            the names and values of the module's state.
        size_bytes: the size of the same; for a module, of its parameters and buffers.
    """

    graph: str
    kind: str
    notes: tuple[str, ...]
    tools: dict[str, str]
    source_digest: str
    size_bytes: int
