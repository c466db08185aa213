"""Structured pruning of ONNX graphs: finds which channels depend on each other and which matter least, and removes
them.

``constant_folding`` folds constants; ``shapes`` observes the shape of every tensor; ``dependency_graph`` follows each
channel through the graph by ``axis_rules`` and ``layer_rules``; ``groups`` joins what must be cut together;
``importance`` and ``sensitivity`` rank channels; ``selection`` decides how many go; ``surgery`` cuts; ``model_cost``
counts parameters and operations.
"""
