"""Tells open pages that something changed (server-sent events). A page then fetches itself again and shows what
differs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kedge.fleet.database import ChangeWatch, Database

LOOK_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
MAX_LISTENERS = 64
"""Open pages that are told; more are asked to come back later."""


class Live:
    """Looks at the database for all open pages.

    Args:
        database: the fleet's.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changed = asyncio.Condition()
        self.number = 0
        """How many changes were seen."""
        self._stopping = False
        self.listeners = 0

    async def run(self) -> None:
        """Look for changes until :meth:`stop`."""
        watch = ChangeWatch(self._database)
        try:
            seen = watch.number()
            while not self._stopping:
                await asyncio.sleep(LOOK_SECONDS)
                if (now := watch.number()) != seen:
                    seen = now
                    await self._notify()
        finally:
            watch.close()

    async def stop(self) -> None:
        """End all streams."""
        self._stopping = True
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self.number += 1
            self._changed.notify_all()

    async def events(self) -> AsyncIterator[str]:
        """Yield an event at once and at each change, and a comment while nothing happens. An event's data are
        :attr:`number`, so that a page knows whether something changed between its making and the first event."""
        self.listeners += 1
        try:
            seen = self.number
            yield f"retry: 3000\nevent: changed\ndata: {seen}\n\n"
            while not self._stopping:
                try:
                    async with self._changed:
                        if self.number == seen:
                            await asyncio.wait_for(self._changed.wait(), KEEP_ALIVE_SECONDS)
                except asyncio.TimeoutError:
                    yield ": nothing new\n\n"
                    continue
                seen = self.number
                yield f"event: changed\ndata: {seen}\n\n"
        finally:
            self.listeners -= 1
