"""OCI documents (image-spec 1.1): descriptors, image indexes, image manifests, as typed views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedge_protocol.codec import named

INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
BUNDLE_TYPE = "application/vnd.kedge.bundle.v1"
"""The ``artifactType`` of a bundle's manifest."""
CONFIG_TYPE = "application/vnd.kedge.bundle.config.v1+json"
FILE_TYPE = "application/vnd.kedge.file.v1"
GOLDEN_TYPE = "application/vnd.kedge.golden.v1"

LAYOUT_FILE = "oci-layout"
"""Marks a folder as an image layout."""

REF_NAME = "org.opencontainers.image.ref.name"
TITLE = "org.opencontainers.image.title"
TARGET = "io.kedge.target"
BACKEND = "io.kedge.backend"
"""The annotation of a bundle's descriptor where the release holds several for its target."""
NAME = "io.kedge.name"
VERSION = "io.kedge.version"
BLOCKS = "io.kedge.blocks"
"""The annotation of a layer with more than one block: the digest of its block map."""


@dataclass(frozen=True, kw_only=True)
class Descriptor:
    """A blob by media type, digest and size (bytes)."""

    media_type: str = named("mediaType")
    digest: str
    size: int
    annotations: dict[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The file name; empty if there is none."""
        return self.annotations.get(TITLE, "")


@dataclass(frozen=True, kw_only=True)
class Index:
    """An image index: ``index.json`` of a layout, or a release."""

    schema_version: int = named("schemaVersion")
    manifests: tuple[Descriptor, ...]
    media_type: str = named("mediaType", default=INDEX_TYPE)
    annotations: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An image manifest: one bundle."""

    schema_version: int = named("schemaVersion")
    config: Descriptor
    layers: tuple[Descriptor, ...]
    media_type: str = named("mediaType", default=MANIFEST_TYPE)
    artifact_type: str | None = named("artifactType", default=None)
    annotations: dict[str, str] = field(default_factory=dict)


def plain(document: Descriptor | Index | Manifest) -> Any:
    """Return plain data for a new document, without empty annotations."""
    from kedge_protocol.codec import unstructure

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if not (k == "annotations" and not v)}
        return [clean(v) for v in value] if isinstance(value, (list, tuple)) else value

    return clean(unstructure(document))
