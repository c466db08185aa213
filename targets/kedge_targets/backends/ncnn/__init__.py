"""ncnn, whose files pnnx makes of ONNX."""

environment: dict[str, str] = {}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
