"""The protocol between host and device: bundles, blocks, topics, messages, errors.

This package imports no other Kedge package. Only :mod:`kedge_protocol.golden` and :mod:`kedge_protocol.tensors` need
numpy; the resident agent does not load these two.
"""

__version__ = "0.1.0"
