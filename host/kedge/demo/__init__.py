"""``make demo``: the main job on real input, end to end, with real processes on loopback."""
