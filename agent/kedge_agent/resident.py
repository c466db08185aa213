"""The resident process: ``python -m kedge_agent.resident CONFIG [-v]``.

``kedge-agent run`` becomes this process by exec, so that what parsed the command line (about 2 MiB of it) does not stay
in memory for months.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from kedge_protocol.errors import KedgeError


def become(config: Path, *, verbose: bool) -> None:
    """Turn this process into the resident agent; does not come back."""
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [sys.executable, "-m", "kedge_agent.resident", str(config), *(["-v"] if verbose else [])]
    os.execv(sys.executable, arguments)


def main() -> int:
    """Run until SIGTERM; 1 on an error of Kedge's, told in one line."""
    logging.basicConfig(
        level=logging.DEBUG if sys.argv[2:] == ["-v"] else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    from kedge_agent import config
    from kedge_agent.daemon import Daemon

    try:
        daemon = Daemon(config.read(Path(sys.argv[1])))
        daemon.catch_signals()
        daemon.run()
    except KedgeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
