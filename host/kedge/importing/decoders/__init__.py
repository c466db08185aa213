"""Imports decoder language models in their published forms: a Hugging Face folder or a GGUF file."""
