"""Decoders on ONNX Runtime: one graph for prefill, chunks, decoding and ragged batches, with caches written in
place."""
