"""Evaluates decoders: texts, the float model's answers, perplexity and divergence."""
