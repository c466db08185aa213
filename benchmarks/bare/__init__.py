"""Baselines: what a person would write by hand, with the library alone and nothing of Kedge."""
