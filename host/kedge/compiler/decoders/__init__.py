"""The way of a decoder language model through the compiler."""
