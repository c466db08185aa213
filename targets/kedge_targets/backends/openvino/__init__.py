"""OpenVINO, with NNCF for int8."""

environment: dict[str, str] = {"CI": "true", "NNCF_CI": "1"}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
