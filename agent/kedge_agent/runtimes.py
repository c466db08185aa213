"""Which runtimes are installed on this machine."""

from __future__ import annotations

import importlib.metadata
import logging

log = logging.getLogger(__name__)


def installed_runtimes(distributions: tuple[str, ...]) -> dict[str, str]:
    """Return the versions of the installed distributions among these, without importing them. A distribution with
    damaged metadata counts as missing."""
    found = {}
    for name in distributions:
        try:
            version: str | None = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 -- said in the log, in one line
            # Python versions differ in what they raise for a folder without METADATA; some give None.
            log.warning("the metadata of %s cannot be read: %s: %s", name, type(error).__name__, error)
            continue
        if version and version.isascii() and version.isprintable():
            found[name] = version
        else:
            log.warning("the metadata of %s give no version", name)
    return found
