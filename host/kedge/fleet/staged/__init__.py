"""Staged rollouts: waves, gates and the evidence that they judge by."""
