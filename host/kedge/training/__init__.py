"""Training ONNX graphs with PyTorch, without a training loop of the user's: see ``network``."""
