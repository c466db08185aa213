"""Trains ONNX graphs with PyTorch, without a training loop from the user; see ``network``."""
