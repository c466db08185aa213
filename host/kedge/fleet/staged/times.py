"""Spans, moments and maintenance windows, as they are written in a policy."""

from __future__ import annotations

import datetime
import math
import re
import zoneinfo
from dataclasses import dataclass

from kedge_protocol.errors import ConfigError

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?\s*(?:d|h|min|m|s)\s*)+|\d+(?:\.\d+)?")
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(d|h|min|m|s)")
_UNITS = {"d": 86400.0, "h": 3600.0, "min": 60.0, "m": 60.0, "s": 1.0}
_HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-4]):([0-5]\d)")


def parse_span(text: str) -> float:
    """Return the seconds of ``90s``, ``15m``, ``1h30m``, ``2d`` or a bare number.

    Raises:
        ConfigError: it is none.
    """
    plain = text.strip().lower()
    if not _SPAN.fullmatch(plain):
        raise ConfigError(f"{text!r} is no time span", remedy="Write 90s, 15m, 1h30m or 2d")
    parts = _PART.findall(plain)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts) if parts else float(plain)
    if not math.isfinite(seconds):
        raise ConfigError(f"the time span {text!r} is too long")
    return seconds


def parse_moment(text: str) -> float:
    """Return the seconds since 1970 of an ISO 8601 time with its offset, such as ``2026-12-01T22:00+01:00``.

    Raises:
        ConfigError: it is none, or has no offset.
    """
    try:
        moment = datetime.datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
    except ValueError as error:
        raise ConfigError(f"{text!r} is no time", remedy="Write 2026-12-01T22:00+01:00") from error
    if moment.tzinfo is None:
        raise ConfigError(f"the time {text!r} has no UTC offset", remedy="Write 2026-12-01T22:00+01:00, or …Z")
    return moment.timestamp()


def moment_text(seconds: float) -> str:
    """Return a time as :func:`parse_moment` reads it, in UTC: ``2026-12-01T21:00Z``."""
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


@dataclass(frozen=True, kw_only=True)
class Window:
    """A maintenance window: outside of it no device is told to update.

    Attributes:
        hours: ``22:00-05:00``; one that ends before it begins goes over midnight and is of the day of its beginning.
        days: on which it begins; all if empty.
        timezone: name of a time zone in the tz database, of all devices.
    """

    hours: str = "00:00-24:00"
    days: tuple[str, ...] = ()
    timezone: str = "UTC"

    def __str__(self) -> str:
        return " ".join(filter(None, (self.hours, ",".join(self.days), self.timezone)))

    def check(self) -> None:
        """Refuse what is no window.

        Raises:
            ConfigError: hours, a day or the time zone cannot be read.
        """
        begin, end = self._minutes()
        if begin == end:
            raise ConfigError(f"the window {self.hours} is empty")
        if wrong := [day for day in self.days if day not in DAYS]:
            raise ConfigError(f"{wrong[0]!r} is no day", remedy=f"Days are {', '.join(DAYS)}")
        self._zone()

    def is_open(self, now: float) -> bool:
        """Return whether devices may be told now (seconds since 1970)."""
        local = datetime.datetime.fromtimestamp(now, self._zone())
        begin, end = self._minutes()
        minute = local.hour * 60 + local.minute
        if begin < end:
            return begin <= minute < end and self._begins_on(local)
        if minute >= begin:
            return self._begins_on(local)
        return minute < end and self._begins_on(local - datetime.timedelta(days=1))

    def _begins_on(self, day: datetime.datetime) -> bool:
        return not self.days or DAYS[day.weekday()] in self.days

    def _minutes(self) -> tuple[int, int]:
        found = _HOURS.fullmatch(self.hours.strip())
        numbers = [int(one) for one in found.groups()] if found else [0, 0, 24, 1]
        begin, end = numbers[0] * 60 + numbers[1], numbers[2] * 60 + numbers[3]
        if end > 24 * 60:
            raise ConfigError(f"{self.hours!r} is not a window's hours", remedy="Write 22:00-05:00")
        return begin, end

    def _zone(self) -> zoneinfo.ZoneInfo:
        try:
            return zoneinfo.ZoneInfo(self.timezone)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigError(
                f"there is no time zone {self.timezone!r}",
                remedy="Write a name such as Europe/Berlin or UTC; the system needs the package tzdata",
            ) from error
