"""Tracks pending block requests and decides when to ask again.

An answer can be lost only with a connection: the device's, the controller's or the broker's. So pending blocks are
requested again when the device's connection is new, when the controller's status shows another boot or session, and
otherwise only after a long silence, which grows with each failed attempt and with the time per block on a slow link: a
fleet must not attack its own server, and a slow link must not carry anything twice.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass

from kedge_agent.update.actions import RequestBlocks
from kedge_agent.update.flow_control import FlowControl
from kedge_agent.update.settings import Settings
from kedge_agent.update.transfer import Transfer
from kedge_protocol.blocks import BLOCK_SIZE, BlockAnswer, BlockStatus
from kedge_protocol.messages import Status

MAX_SILENCE = 600.0
"""Upper limit of the patience, in seconds."""
MAX_PAUSE = 60.0
"""Longest pause, in seconds, after a busy answer."""


class Allowance:
    """A token bucket that limits how many blocks may be requested now.

    Args:
        rate: blocks per second; 0 for no limit.
        window: smallest capacity of the bucket, in blocks.
    """

    def __init__(self, rate: float, window: int) -> None:
        self._rate = rate
        self._most = max(float(window), rate / 2)
        self._tokens = self._most
        self._at: float | None = None

    def blocks(self, now: float) -> int:
        """Return how many blocks are allowed now."""
        if not self._rate:
            return sys.maxsize
        elapsed = 0.0 if self._at is None else max(0.0, now - self._at)
        self._at = now
        self._tokens = min(self._most, self._tokens + elapsed * self._rate)
        return int(self._tokens)

    def spend(self, blocks: int) -> None:
        """Take requested blocks off the allowance."""
        self._tokens -= blocks if self._rate else 0


@dataclass
class _PendingRequest:
    """A pending request: its transfer, its time, and the blocks not yet answered."""

    transfer: Transfer
    at: float
    left: set[int]


class BlockRequests:
    """Requests and answers of all transfers.

    Args:
        boot_id: boot id of this start of the agent; it makes request ids unique.
        settings: provide window and silence.
        chance: source of jitter.
    """

    def __init__(self, boot_id: str, settings: Settings, chance: random.Random) -> None:
        self.vain = 0
        """Number of consecutive times that pending blocks did not arrive although the controller is online."""
        self._small_came = self._whole_came = False
        self._boot_id = boot_id
        self._settings = settings
        self._chance = chance
        self._connected = False
        self._controller: tuple[str, int] | None = None
        self._transfers: list[Transfer] = []
        self._asked: dict[str, _PendingRequest] = {}
        self._now = 0.0
        self._pace = FlowControl(settings.window)
        self._requests = 0
        self._heard_at = 0.0
        self._patience = settings.silence
        self._allowance = Allowance(settings.bytes_per_second / BLOCK_SIZE, settings.window)

    @property
    def ready(self) -> bool:
        """Return whether a controller is available."""
        return self._connected and self._controller is not None

    def connected(self) -> None:
        """Note a new connection. The controller counts as offline until its retained status arrives."""
        self.disconnected()
        self._connected = True

    def disconnected(self) -> None:
        """Note the loss of the connection and of all pending answers."""
        self._connected = False
        self._controller = None
        self._ask_anew()

    def controller_seen(self, status: Status) -> None:
        """Note the controller's status: a new boot or session did not get earlier requests."""
        spoke = (status.boot_id, status.session)
        if not status.online and self._controller not in (None, spoke):
            return  # the late will of an earlier session
        seen = spoke if status.online else None
        if seen != self._controller:
            self._controller = seen
            self._ask_anew()

    def add(self, transfer: Transfer) -> None:
        """Start requesting a transfer's blocks."""
        self._transfers.append(transfer)

    def drop(self, transfer: Transfer) -> None:
        """Stop requesting a transfer's blocks; pending answers are ignored."""
        self._transfers = [other for other in self._transfers if other is not transfer]
        self._asked = {rid: other for rid, other in self._asked.items() if other.transfer is not transfer}

    @property
    def cut_off(self) -> bool:
        """Return whether small answers arrive on this connection but full blocks do not."""
        return self.vain > 1 and self._small_came and not self._whole_came

    def answered(self, rid: str, answer: BlockAnswer, now: float) -> Transfer | None:
        """Return the transfer of request ``rid``; None for an unknown request."""
        asked = self._asked.get(rid)
        if asked is None:
            return None
        if len(answer.payload) == BLOCK_SIZE:
            self._whole_came = True
            self._pace.arrived(asked.at, now)
        elif answer.status is BlockStatus.OK:
            self._small_came = True
        asked.left.discard(answer.index)
        if not asked.left:
            del self._asked[rid]
        self._heard_at = now
        self._patience = self._pace.patience(self._settings.silence)
        self.vain = 0
        return asked.transfer

    def busy(self, transfer: Transfer, index: int, now: float) -> None:
        """Note a busy answer for one block: the transfer pauses, longer each time."""
        transfer.want_again(index)
        if now >= transfer.paused_until:
            transfer.busy += 1
            pause = min(MAX_PAUSE, 2.0 ** min(transfer.busy, 10))
            transfer.paused_until = now + pause * self._chance.uniform(0.5, 1.0)

    def asks(self, now: float) -> list[RequestBlocks]:
        """Return the requests to send now."""
        self._now = now
        if not self.ready or not self._transfers:
            return []
        outstanding = sum(len(transfer.asked) for transfer in self._transfers)
        if outstanding and now - self._heard_at > self._patience:
            self.vain += 1
            self._pace.lost(now)
            grown = min(MAX_SILENCE, self._patience * 2)
            self._patience = grown * self._chance.uniform(0.75, 1.25)
            self._heard_at = now
            for transfer in self._transfers:
                transfer.forget_asked()
            outstanding = 0
        free = min(self._pace.window - outstanding, self._allowance.blocks(now))
        batch = max(1, self._pace.window // 2)
        if not outstanding:
            self._heard_at = now
        made: list[RequestBlocks] = []
        for transfer in list(self._transfers):
            # A request is sent full, or with all that is left: half the window is always under way meanwhile.
            while now >= transfer.paused_until and transfer.wants and free >= min(batch, transfer.wants):
                self._requests += 1
                rid = f"{self._boot_id}-{self._requests}"
                taken = transfer.take(batch, rid)
                if not taken:
                    break
                free -= len(taken)
                self._allowance.spend(len(taken))
                self._asked[rid] = _PendingRequest(transfer, now, set(taken))
                made.append(RequestBlocks(rid, transfer.request(taken, self._boot_id)))
        if len(self._transfers) > 1:
            self._transfers.append(self._transfers.pop(0))
        return made

    def _ask_anew(self) -> None:
        self._patience = self._pace.patience(self._settings.silence)
        self.vain = 0
        self._small_came = self._whole_came = False
        if any(transfer.asked for transfer in self._transfers):
            self._pace.lost(self._now)
        for transfer in self._transfers:
            transfer.forget_asked()
            transfer.paused_until = 0.0
