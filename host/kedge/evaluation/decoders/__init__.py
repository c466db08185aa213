"""What a decoder is measured on, and how: texts, the float model's answers, perplexity and divergence."""
