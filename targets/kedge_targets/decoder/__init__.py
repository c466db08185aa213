"""Decoder language models: what one is (``spec``), how its weights are stored (``matrix``, ``rounding``, ``layout``),
and what a backend does with it (``contract``, ``session``)."""
