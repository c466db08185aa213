"""What goes to the worker and back when a model is imported: plain data, JSON on the wire."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """Bring ``source`` to an ONNX graph; made by :func:`kedge.importing.api.request`.

    Attributes:
        source: an absolute path, ``/absolute/file.py:factory`` or ``dotted.module:factory``.
        workdir: an empty folder that outlives the call; the graph is written there.
        inputs: input's name → ``.npy`` file of one or two samples as the model takes them, first axis samples.
        batch: samples at once that the graph shall be fixed to; None leaves free what the source leaves free.
        folder: the user's current folder: modules are looked for there, and a factory runs in it.
        trust_pickle: whether a file may be read that may run code then.
    """

    source: str
    workdir: str
    inputs: dict[str, str] = field(default_factory=dict)
    batch: int | None = None
    folder: str = "."
    trust_pickle: bool = False


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an import made.

    Attributes:
        graph: the ONNX file; the user's own where the source is one and nothing was to be fixed.
        kind: of the source, in words for people (``PyTorch module``).
        notes: what was decided (``batch fixed to 1: …``, ``free axes: batch, sequence``).
        tools: package → version of what read and exported it.
        source_digest: ``sha256:…`` of the user's file, of a folder's files and their names, or of a factory's file
            together with the names and numbers of the module's state.
        size_bytes: of the same; of a module, its parameters and buffers.
    """

    graph: str
    kind: str
    notes: tuple[str, ...]
    tools: dict[str, str]
    source_digest: str
    size_bytes: int
