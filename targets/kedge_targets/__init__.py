"""Targets and backends: what a device is (``devices/*.toml``), how a model is lowered for it and run on it (a folder
below ``backends``), and the worker, the child process for everything that must not take its caller down.

A backend declares and lowers; the host decides. Nothing heavy is imported before it is used.
"""
