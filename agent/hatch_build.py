"""Hatch's hooks for both distributions: each wheel's files, one version, and that the host's needs the agent's."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from hatchling.metadata.plugin.interface import MetadataHookInterface

TREE = Path(__file__).resolve().parent.parent


class Files(BuildHookInterface):  # type: ignore[type-arg] # hatchling is there while a wheel is built only
    """Cuts the wheel; an editable installation has the folders themselves."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Hatchling's: name the wheel's files."""
        if version == "editable":
            return
        cut = runpy.run_path(str(TREE / "agent" / "agent_files.py"))
        build_data["force_include"] = {str(path): place for place, path in cut[self.config["files"]](TREE).items()}


class Version(MetadataHookInterface):
    """The host's needs the agent's of its own version."""

    PLUGIN_NAME = "custom"

    def update(self, metadata: dict[str, Any]) -> None:
        """Hatchling's: fill in what pyproject.toml calls dynamic."""
        own = runpy.run_path(str(TREE / "protocol" / "kedge_protocol" / "__init__.py"))["__version__"]
        names = runpy.run_path(str(TREE / "protocol" / "kedge_protocol" / "packages.py"))
        metadata["version"] = own
        if metadata["name"] == names["HOST"]:
            metadata["dependencies"] = [f"{names['AGENT']}=={own}"]
