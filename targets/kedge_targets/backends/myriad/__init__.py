"""Movidius Myriad X: Luxonis' OAK cameras and Intel's Neural Compute Stick 2, in FP16 with fixed shapes."""

# By itself ``import depthai`` (3.12) writes an identifier to the user's cache and opens a connection.
environment: dict[str, str] = {
    "DEPTHAI_TELEMETRY": "0",
    "DEPTHAI_DISABLE_FEEDBACK": "1",
    "DEPTHAI_DISABLE_CRASHDUMP_COLLECTION": "1",
    "DEPTHAI_DISABLE_STARTUP_NOTIFICATIONS": "1",
    "DEPTHAI_LEVEL": "error",
}
"""Environment variables set in every child process: see :mod:`kedge_targets.worker.environment`."""
