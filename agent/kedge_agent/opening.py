"""Opens the model that a command names: a release folder, or what the fleet installed."""

from __future__ import annotations

from pathlib import Path

from kedge_agent.model import Model
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import BundleError


def open_model(
    source: str, *, target: str | None = None, backend: str | None = None, state: Path | None = None
) -> Model:
    """Open a model.

    Args:
        source: name of an installed model, or a release folder.
        target: which bundle of the folder; may be omitted if it has bundles for one target.
        backend: see :class:`kedge_agent.Model`.
        state: the agent's state folder with installed models; None for the default.

    Raises:
        BundleError: the folder has bundles for several targets and none is named, or none for ``target``.
        KedgeError: as :class:`kedge_agent.Model`.
    """
    if target is None and (Path(source) / "oci-layout").is_file():
        target = chosen_target(Layout(Path(source)), None)
        state = None
    return Model(source, target=target, backend=backend, state=state)


def chosen_target(layout: Layout, target: str | None) -> str:
    """Return the given target, or the only one of a release.

    Raises:
        BundleError: none is given, and the release has not bundles for exactly one.
    """
    if target is not None:
        return target
    there = sorted(layout.release().bundles)
    if len(there) != 1:
        raise BundleError(
            f"has bundles for {len(there)} targets",
            where=str(layout.path),
            remedy=f"Name one with --target: {', '.join(there)}",
        )
    return there[0]
