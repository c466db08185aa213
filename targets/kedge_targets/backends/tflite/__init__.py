"""TFLite: LiteRT on the device, TensorFlow's converter in a toolchain of its own."""

environment: dict[str, str] = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}
"""Told to every child: see :mod:`kedge_targets.worker.environment`."""
