"""``make demo``: the main workflow on real input, end to end, with real processes on loopback."""
