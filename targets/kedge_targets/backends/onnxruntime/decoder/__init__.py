"""Decoders on ONNX Runtime: one graph for prefill, chunk, decode and ragged batches, caches written in place."""
