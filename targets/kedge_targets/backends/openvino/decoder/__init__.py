"""Decoders on OpenVINO: a stateful model as openvino-genai takes it too (``graph``), and its session."""
