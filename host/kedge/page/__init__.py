"""The controller's page: the fleet in a browser, the same verbs as JSON routes, and metrics for Prometheus."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kedge_protocol.errors import MissingDependencyError

if TYPE_CHECKING:
    from kedge.fleet.options import ControllerOptions
    from kedge.page.options import PageOptions


def run(state: Path | None, options: ControllerOptions, page: PageOptions) -> None:
    """Run a controller, with its page if one is asked for, until SIGTERM or SIGINT.

    Args:
        state: the state folder; None for :func:`kedge.fleet.database.state_folder`'s choice.

    Raises:
        ConfigError: the options do not fit, or the page's address is taken.
        MissingDependencyError: the page's packages are missing.
        FleetError, StorageError: as :func:`kedge.fleet.controller.run`.
    """
    from kedge.fleet import controller

    options.parsed()
    address = page.parsed()
    if address is None:
        controller.run(state, options)
        return
    from kedge.fleet.database import state_folder

    try:
        from kedge.page.server import serving
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"the page needs the package {error.name}", remedy="Install it: pip install 'kedge-host[page]'"
        ) from error
    with serving(state_folder(state), address):
        controller.run(state, options)
