"""``python -m kedge_agent.shadow``: see :mod:`kedge_agent.shadow.process`."""

import sys

from kedge_agent.shadow.process import main

sys.exit(main())
