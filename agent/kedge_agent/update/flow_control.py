"""Flow control: as many blocks may be pending as arrive within a few seconds.

Pending blocks wait in the link's queue, and everything else on this connection waits behind them: the broker's
acknowledgements, and its ping response, without which the connection counts as lost and all pending blocks are sent
twice. So the time from a block's request to its arrival is held to :data:`TARGET_SECONDS`, as in delay-based congestion
control (L. Brakmo, TCP Vegas): below half of it, the window grows by one per block; above it, the window shrinks in
proportion.
"""

from __future__ import annotations

TARGET_SECONDS = 6.0
"""A third of the time that a connection survives without an answer (:data:`kedge_protocol.mqtt.KEEPALIVE`)."""
MAX_PATIENCE = 600.0
"""Seconds."""
_FIRST_WINDOW = 2
_PATIENCE = 4.0
"""Multiple of the recent time per block after which a block counts as lost."""


class FlowControl:
    """The window of one device, over all its downloads.

    Args:
        most: largest size of the window, in blocks.
    """

    def __init__(self, most: int) -> None:
        self.window = min(_FIRST_WINDOW, most)
        self._most = most
        self._latest = 0.0
        self._shrunk_at = float("-inf")

    def patience(self, least: float) -> float:
        """Return the seconds of silence that count as a loss; at least ``least``."""
        return max(least, min(_PATIENCE * self._latest, MAX_PATIENCE))

    def arrived(self, asked_at: float, now: float) -> None:
        """Note the arrival of a full block that was requested at that time."""
        self._latest = now - asked_at
        if self._latest < TARGET_SECONDS / 2:
            self.window = min(self._most, self.window + 1)
        elif self._latest > TARGET_SECONDS and asked_at >= self._shrunk_at:
            # What was asked before the window shrank tells nothing of the smaller one.
            self.window = max(1, int(self.window * TARGET_SECONDS / self._latest))
            self._shrunk_at = now

    def lost(self, now: float) -> None:
        """Note the loss of the pending blocks."""
        self.window = max(1, self.window // 2)
        self._shrunk_at = now
