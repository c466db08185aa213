"""The resident process: ``python -m kedge_agent.resident CONFIG [-v]``.

``kedge-agent run`` becomes this process by exec, so that the command line's parser (about 2 MiB) does not stay in
memory for months.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from kedge_protocol.errors import KedgeError


def become(config: Path, *, verbose: bool) -> None:
    """Replace this process by the resident agent; it does not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    arguments = [sys.executable, "-m", "kedge_agent.resident", str(config), *(["-v"] if verbose else [])]
    os.execv(sys.executable, arguments)


def main() -> int:
    """Run until SIGTERM; return 1 after one of Kedge's errors, printed as one line."""
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
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
