"""Noticing another device of this name.

Two clients of one name throw each other off the broker for ever. Neither ever meets the other; but when this device has
spoken and then hears of a boot that is none of its own as its retained status, somebody else spoke in between.
"""

from __future__ import annotations

from collections.abc import Collection

FORGET_SECONDS = 600.0
"""Without a sign of the other before it is taken for gone."""


class NameConflict:
    """Listens to what is said of this device's presence.

    Args:
        boot_id: of this start.
        earlier: boots of this device before: a broker may come back with an old store.
    """

    def __init__(self, boot_id: str, earlier: Collection[str] = ()) -> None:
        self.boot: str | None = None
        """Of the other device; None while there is none."""
        self._own = boot_id
        self._earlier = frozenset(earlier)
        self._has_spoken = False
        self._fresh = False
        self._heard_at = 0.0

    def heard(self, boot_id: str) -> bool:
        """A boot was named as this device's. Returns whether that is news."""
        if boot_id == self._own:
            self._has_spoken = True
            return False
        if not self._has_spoken or boot_id in self._earlier:
            return False
        news = self.boot is None
        self.boot, self._fresh = boot_id, True
        return news

    def watch(self, now: float) -> bool:
        """Forget one that has not been heard for long; whether that is news. ``now``: seconds of a steady clock."""
        if self._fresh:
            self._fresh, self._heard_at = False, now
        if self.boot is None or now - self._heard_at < FORGET_SECONDS:
            return False
        self.boot = None
        return True
