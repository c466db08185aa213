"""Estimates how far values reach that calibration did not see.

``kedge_targets.graph.unseen_ends`` does the same for backends whose graphs Kedge quantizes itself, and says why."""

import numpy

FEW = 256
"""Values of one group of samples, up to which a single one counts."""
_DOUBLINGS = 4.0
_FEWEST, _DEPTH = 3, 10


class Ends:
    """The largest and the smallest value of each group."""

    def __init__(self):
        self._high = []
        self._low = []

    def add(self, values):
        """Add a group."""
        self._high.append(float(values.max()))
        self._low.append(float(values.min()))

    def beyond(self, low, high):
        """Return a range with its ends further out; an end at 0 stays."""
        if high > 0:
            high += _DOUBLINGS * _growth(self._high)
        if low < 0:
            low -= _DOUBLINGS * _growth([-one for one in self._low])
        return low, high


def _growth(largest):
    ordered = numpy.sort(numpy.asarray(largest, numpy.float64))[::-1]
    depth = min(max(len(ordered) // 10, _FEWEST), _DEPTH, len(ordered) - 1)
    above = ordered[:depth][ordered[:depth] > ordered[depth]]
    return float(numpy.log(2) * (above.mean() - ordered[depth])) if above.size else 0.0
