"""Compiles decoder language models."""
