"""Movidius Myriad X: Luxonis' OAK cameras and Intel's Neural Compute Stick 2, in FP16 with fixed shapes."""

environment: dict[str, str] = {"DEPTHAI_LEVEL": "error"}
"""Told to every child: see :mod:`kedge_targets.worker.environment`."""
