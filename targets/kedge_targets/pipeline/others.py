"""Which other bundles a pipeline names; without numpy, as the agent's own process needs it."""

from __future__ import annotations

from dataclasses import dataclass

from kedge_protocol.bundle.pipeline import Pipeline

CONSENT = "KEDGE_CASCADE"
"""Environment variable: inputs go to the larger model that a bundle names only where it is ``on``."""


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """Another bundle.

    Attributes:
        folder: holds its files by title.
        config: path of its configuration blob.
        digest: of the bundle.
    """

    folder: str
    config: str
    digest: str


def names(pipeline: Pipeline | None) -> tuple[str, ...]:
    """Return the models that a pipeline itself names."""
    if pipeline is None or pipeline.then is None:
        return ()
    return tuple(dict.fromkeys(filter(None, (pipeline.then.model, pipeline.then.turned_by))))
