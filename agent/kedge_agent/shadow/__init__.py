"""A new bundle beside the one that serves, on a sample of its live inputs: ``tap`` sends them, ``process`` is the child
that answers and compares, ``runner`` starts and watches it."""
