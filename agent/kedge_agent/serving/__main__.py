"""``python -m kedge_agent.serving``: the serving process."""

from __future__ import annotations

import sys

from kedge_agent.serving.child_process import main

if __name__ == "__main__":
    sys.exit(main())
