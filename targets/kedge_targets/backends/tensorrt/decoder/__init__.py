"""Decoders on NVIDIA's GPUs: ONNX Runtime's fused operators in float16, by its CUDA provider."""
