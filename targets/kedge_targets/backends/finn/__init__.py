"""FPGAs through FINN: quantized networks of few bits as a dataflow in programmable logic.

The host's half runs the FINN+ compiler in an isolated toolchain; the device's half runs a bitfile through FINN's own
driver, or the streamlined integer graph in numpy.
"""

environment: dict[str, str] = {}
"""Empty, since FINN+ has no telemetry to switch off."""
