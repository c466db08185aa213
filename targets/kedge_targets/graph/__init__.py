"""ONNX helpers that the host and several backends share.

``reading`` a file (and saying clearly what is wrong with it), ``nodes``, ``signature`` (inputs and outputs as plain
data), ``layout`` of an input, ``batch``, ``writing``; ``preparing``, ``samples`` and ``passes`` serve ONNX Runtime's
quantizer, which two backends use. All work on ``onnx.ModelProto`` in memory; nobody changes the
user's file. ``onnx`` and ``onnxruntime`` are imported where they are used.
"""
