"""TFLite: LiteRT on the device, TensorFlow's converter in a separate toolchain."""

environment: dict[str, str] = {"TF_CPP_MIN_LOG_LEVEL": "2", "TF_ENABLE_ONEDNN_OPTS": "0", "KERAS_BACKEND": "tensorflow"}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
