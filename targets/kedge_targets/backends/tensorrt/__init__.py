"""TensorRT on NVIDIA's GPUs: the bundle carries graphs and a recipe, the device builds the engine."""

environment: dict[str, str] = {"CUDA_MODULE_LOADING": "LAZY"}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
