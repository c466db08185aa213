"""Structured pruning on the ONNX graph itself: which channels hang together, which matter least, cutting them out.

``folding`` makes constants of what is constant, ``shapes`` observes what every tensor looks like, ``tracking`` and
``rules_*`` follow each channel through the graph, ``groups`` puts together what must go together, ``importance`` and
``sensitivity`` rank, ``choosing`` decides how many, ``surgery`` cuts, ``counting`` says what was won.
"""
