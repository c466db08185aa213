"""ONNX Runtime."""

environment: dict[str, str] = {"ORT_DISABLE_TELEMETRY": "1"}
"""Told to every child: see :mod:`kedge_targets.worker.environment`."""
