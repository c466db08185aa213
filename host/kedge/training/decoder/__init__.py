"""Decoders as PyTorch modules, and their distillation."""
