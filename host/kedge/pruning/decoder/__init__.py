"""Prunes decoders: feed-forward width, attention heads, whole layers."""
