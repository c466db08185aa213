"""Random small graphs of the operators that real models have: ``drawn.graph(seed)``."""

from tests.support.drawn.drawing import Drawing, Graph
from tests.support.drawn.models import coverage, graph

__all__ = ["Drawing", "Graph", "coverage", "graph"]
