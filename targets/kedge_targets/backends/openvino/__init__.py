"""OpenVINO, with NNCF for int8."""

environment: dict[str, str] = {"CI": "true", "NNCF_CI": "1"}
"""Told to every child: see :mod:`kedge_targets.worker.environment`."""
