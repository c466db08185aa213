"""Decoder language models: their specification (``spec``), the storage of their weights (``matrix``, ``rounding``,
``layout``), and their backends' contract (``contract``, ``session``)."""
