"""TensorRT on NVIDIA's GPUs: the bundle carries graphs and a recipe, the device builds the engine."""

environment: dict[str, str] = {"CUDA_MODULE_LOADING": "LAZY"}
"""Told to every child: see :mod:`kedge_targets.worker.environment`."""
