"""Compression: a float model becomes a smaller one that keeps its promise.

``step`` is the contract of one step over the graph, ``steps`` holds Kedge's own (a file each) and finds those of third
parties; ``training`` runs graphs in PyTorch; ``sensitivity`` measures what each layer suffers; ``search`` looks for the
best candidate within a budget; ``recipe`` is what a person reads, edits and runs again.
"""
