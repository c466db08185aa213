"""Digests of the user's input, the same on every machine and at any time."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from kedge_protocol import digest


def of_path(path: Path) -> tuple[str, int]:
    """Return the digest and size of a file, or of a folder's files and their names, sorted.

    What is hidden is left out: ``.git`` and the ``.cache`` of Hugging Face's downloads hold times and second copies.
    """
    if path.is_file():
        return digest.of_file(path), path.stat().st_size
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path)))
    lines = [f"{file.relative_to(path).as_posix()} {digest.of_file(file)}" for file in files]
    return digest.of_bytes("\n".join(lines).encode()), sum(file.stat().st_size for file in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def of_module(module: Any, code: Path | None) -> tuple[str, int]:
    """Return the digest of a PyTorch module's state (names, dtypes, shapes, bytes) and of the file that built it, and
    the size of its parameters and buffers."""
    import torch

    state = hashlib.sha256()
    size = 0
    for name, tensor in sorted(module.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            state.update(f"{name} {tensor!r}".encode())
            continue
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {len(raw)}\n".encode())
        state.update(raw)
        size += len(raw)
    parts = [state.hexdigest(), *([digest.of_file(code)] if code is not None else [])]
    return digest.of_bytes("\n".join(parts).encode()), size
