"""Histograms of latencies that can be added: what a device counts and sends, and what the controller merges.

The buckets are log-linear: 8 of equal width for each power of two from 1.024 µs to 137 s, one below, one above (as in
HdrHistogram, G. Tene), so a quantile read from them is within about 6 % of the true one. On the wire a histogram is
sparse: a bucket's number as text → its count, at most :data:`BUCKETS` entries.

This module does not use numpy, which the resident agent does not load.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

LOWEST_BIT, HIGHEST_BIT = 10, 37
BUCKETS = (HIGHEST_BIT - LOWEST_BIT) * 8 + 2
"""Number of buckets."""
_NUMBERS = {str(bucket): bucket for bucket in range(BUCKETS)}


def bucket_of(nanoseconds: int) -> int:
    """Return the number of the bucket that counts this latency."""
    bits = nanoseconds.bit_length()
    if bits <= LOWEST_BIT:
        return 0
    if bits > HIGHEST_BIT:
        return BUCKETS - 1
    return ((bits - LOWEST_BIT) << 3) + (nanoseconds >> (bits - 4)) - 15


def bounds(bucket: int) -> tuple[float, float]:
    """Return the lower and upper end of a bucket in nanoseconds; those of the last one are equal."""
    if bucket == 0:
        return 0.0, float(1 << LOWEST_BIT)
    power, part = divmod(bucket - 1, 8)
    width = 1 << (LOWEST_BIT - 3 + power)
    low = (8 + part) * width
    return float(low), float(low if bucket == BUCKETS - 1 else low + width)


def percentile_ms(counts: Sequence[int], share: float) -> float:
    """Return the latency in milliseconds that ``share`` (0..1) of the calls did not exceed, within about 6 %; 0.0
    without calls.

    Args:
        counts: :data:`BUCKETS` counts.
    """
    return _percentile_ms([(bucket, count) for bucket, count in enumerate(counts) if count], share)


def percentiles_ms(histogram: Mapping[str, int], shares: Iterable[float]) -> list[float]:
    """Return the latencies of several shares, as :func:`percentile_ms`, of a histogram as it is sent."""
    pairs = sorted((_NUMBERS[key], count) for key, count in histogram.items() if key in _NUMBERS and count > 0)
    return [_percentile_ms(pairs, share) for share in shares]


def _percentile_ms(pairs: Sequence[tuple[int, int]], share: float) -> float:
    wanted = share * sum(count for _, count in pairs)
    seen = 0
    for bucket, count in pairs:
        if seen + count >= wanted:
            low, high = bounds(bucket)
            return (low + (high - low) * max(0.0, wanted - seen) / count) / 1e6
        seen += count
    return 0.0


def sparse(counts: Sequence[int]) -> dict[str, int]:
    """Return a histogram as it is sent."""
    return {str(bucket): count for bucket, count in enumerate(counts) if count}


def merged(histograms: Iterable[Mapping[str, int]]) -> list[int]:
    """Add histograms as they are sent; entries that are no bucket or no count are left out.

    Returns:
        :data:`BUCKETS` counts.
    """
    total = [0] * BUCKETS
    for histogram in histograms:
        for key, count in histogram.items():
            number = _NUMBERS.get(key)
            if number is not None and count > 0:
                total[number] += count
    return total


def added(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    """Add two histograms as they are sent; entries that are no bucket or no count are left out."""
    total: dict[str, int] = {}
    for histogram in (one, other):
        for key, count in histogram.items():
            if key in _NUMBERS and count > 0:
                total[key] = total.get(key, 0) + count
    return total
