"""Kedge's two distributions, by their names in a package index, and how to install an extra of theirs.

The name ``kedge`` belongs to somebody else there: no text of Kedge tells anybody to install it.
"""

from __future__ import annotations

import re

HOST = "kedge-host"
"""What compiles and controls: the package ``kedge`` and the command of that name. It depends on :data:`AGENT`."""
AGENT = "kedge-agent"
"""What a device needs: ``kedge_agent``, ``kedge_protocol`` and the devices' part of ``kedge_targets``."""


def pip_install(extra: str, *, of: str = HOST) -> str:
    """The command that installs what an extra needs, beside the distribution that is installed already.

    Args:
        of: :data:`HOST` or :data:`AGENT`.
    """
    return f'pip install "{of}[{extra}]"'


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, to compare: ``10.3.0.post1`` is 10, 3, 0, 1."""
    return tuple(int(number) for number in re.findall(r"\d+", version))
