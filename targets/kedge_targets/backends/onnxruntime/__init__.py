"""ONNX Runtime."""

environment: dict[str, str] = {"ORT_DISABLE_TELEMETRY": "1"}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
