"""cuda-python up to 12.5: the runtime module is called cudart."""
