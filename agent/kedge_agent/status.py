"""Reads an agent's status from its state folder, whether or not the agent runs."""

from __future__ import annotations

import os
from pathlib import Path

from kedge_agent import persistent_state
from kedge_agent.slots import model_folders
from kedge_protocol import files
from kedge_protocol.errors import BundleError, StorageError


def is_running(state: Path) -> bool:
    """Return whether an agent holds the state folder."""
    try:
        handle = os.open(state / "agent.lock", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not files.try_lock(handle, shared=True)
    finally:
        os.close(handle)


def read_status(state: Path) -> str:
    """Return readable lines: the agent, then each model.

    Raises:
        StorageError: the state folder does not exist or is not readable.
    """
    if not state.is_dir():
        raise StorageError("there is no state folder", where=str(state), remedy="Give --state or --config")
    content = persistent_state.read(state)
    lines = [f"state {state}: the agent is {'running' if is_running(state) else 'not running'}"]
    refused = dict(content.memory.refused)
    for folder in model_folders(state):
        current = folder.current()
        if current is None:
            continue
        try:
            version = current.bundle().config.version
        except (OSError, BundleError) as error:
            version = f"damaged ({error})"
        serving = folder.serving()
        loaded = serving is not None and serving.digest == current.digest and serving.error is None
        lines.append(f"{folder.name} {version} {current.digest[:19]} {'served over HTTP' if loaded else 'installed'}")
        previous = folder.previous()
        if previous is not None:
            lines.append(f"  previous {previous.digest[:19]}")
        if serving is not None and serving.digest == current.digest and serving.detail is not None:
            lines.append(f"  {serving.detail}")
        if serving is not None and serving.error is not None:
            lines.append(f"  serving: {serving.error}")
        lines += _refusal(refused.pop(folder.name, None))
    for name, refusal in sorted(refused.items()):
        lines += [f"{name}: nothing installed", *_refusal(refusal)]
    return "\n".join(lines)


def _refusal(refusal: persistent_state.Refusal | None) -> list[str]:
    if refusal is None:
        return []
    failure = refusal.failure
    return [f"  refused {failure.digest[:19]} at {failure.stage}: {failure.reason}"]
