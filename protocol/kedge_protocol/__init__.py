"""The protocol between host and device: bundles, blocks, topics, messages, errors.

This package imports none of the others. Only :mod:`kedge_protocol.golden` and :mod:`kedge_protocol.tensors` need
numpy; the resident agent does not load them.
"""

__version__ = "0.1.0"
