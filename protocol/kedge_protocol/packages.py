"""Kedge's two distributions, by their names in a package index, and how to install their extras.

The name ``kedge`` belongs to another project there: no text of Kedge tells anybody to install it.
"""

from __future__ import annotations

import re

HOST = "kedge-host"
"""The distribution for compiling and controlling: the package ``kedge`` and the command of that name. It depends on
:data:`AGENT`."""
AGENT = "kedge-agent"
"""The distribution for a device: ``kedge_agent``, ``kedge_protocol`` and the devices' part of ``kedge_targets``."""


def pip_install(extra: str, *, of: str = HOST) -> str:
    """Return the command that installs an extra in addition to the distribution that is already installed.

    Args:
        of: :data:`HOST` or :data:`AGENT`.
    """
    return f'pip install "{of}[{extra}]"'


def version_numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, for comparison: ``10.3.0.post1`` is 10, 3, 0, 1."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
