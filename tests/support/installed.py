"""Putting a release on a device's disk the way the agent does, without an agent."""

from __future__ import annotations

from pathlib import Path

from kedge_agent.slots import ModelFolder
from kedge_protocol.bundle.layout import Layout


def install(state: Path, release: Path, target: str = "generic-cpu") -> ModelFolder:
    """Assemble the bundle's slot and switch to it."""
    layout = Layout(release)
    bundle = layout.bundle(target)
    folder = ModelFolder(state, bundle.config.name)
    folder.switch(folder.assemble(bundle, layout.blob_path))
    return folder
