"""What turns raw data into a model's tensors and a model's tensors into answers: one code for host and device."""
