"""Detects another device with the same name.

Two clients with one name disconnect each other from the broker forever. Neither meets the other, but if this device has
published its status and then receives a retained status with a foreign boot id, another device has published in
between.
"""

from __future__ import annotations

from collections.abc import Collection

FORGET_SECONDS = 600.0
"""Seconds without a sign of the other device until it counts as gone."""


class NameConflict:
    """Watches the presence messages of this device's name.

    Args:
        boot_id: boot id of this start.
        earlier: earlier boot ids of this device, since a broker may come back with an old store.
    """

    def __init__(self, boot_id: str, earlier: Collection[str] = ()) -> None:
        self.boot: str | None = None
        """Boot id of the other device; None if there is none."""
        self._own = boot_id
        self._earlier = frozenset(earlier)
        self._has_spoken = False
        self._fresh = False
        self._heard_at = 0.0

    def heard(self, boot_id: str) -> bool:
        """Note a boot id published under this device's name; return whether it is new."""
        if boot_id == self._own:
            self._has_spoken = True
            return False
        if not self._has_spoken or boot_id in self._earlier:
            return False
        news = self.boot is None
        self.boot, self._fresh = boot_id, True
        return news

    def watch(self, now: float) -> bool:
        """Drop a conflict that has not been heard for long; return whether that changes anything. ``now``: seconds of a
        monotonic clock."""
        if self._fresh:
            self._fresh, self._heard_at = False, now
        if self.boot is None or now - self._heard_at < FORGET_SECONDS:
            return False
        self.boot = None
        return True
