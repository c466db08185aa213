"""Decoder language models as they are published: a folder of Hugging Face's form, or a GGUF file."""
