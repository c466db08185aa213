"""Turns raw data into a model's tensors and a model's tensors into answers; host and device share this code."""
