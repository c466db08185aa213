"""The cost of quantization, layer by layer, and the graph transformations that prepare a model for it."""
