"""An embedded broker for a start without an external one: amqtt (MQTT 3.1.1, about two hundred devices) on its own
thread. It has no access control, so it listens on loopback by default."""

from __future__ import annotations

import asyncio
import logging
import threading
import warnings
from typing import Any

from kedge_protocol import addresses
from kedge_protocol.errors import BrokerError

log = logging.getLogger(__name__)

START_SECONDS = 15.0


class EmbeddedBroker:
    """The embedded broker. Call :meth:`start` and :meth:`stop` once each.

    Args:
        listen: ``host:port``.
    """

    def __init__(self, listen: str) -> None:
        self.host, self.port = addresses.parse(listen)
        self._loop = asyncio.new_event_loop()
        self._started = threading.Event()
        self._problem: BaseException | None = None
        self._done: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="broker", daemon=True)

    @property
    def url(self) -> str:
        """Return the broker's URL for clients on this machine."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"mqtt://{addresses.join(host, self.port)}"

    def start(self) -> None:
        """Start listening; return when the broker listens.

        Raises:
            BrokerError: the address is taken, or is not of this machine.
        """
        if not addresses.is_loopback(self.host):
            log.warning("the embedded broker lets everybody in, and %s can be reached from outside", self.host)
        self._thread.start()
        if not self._started.wait(START_SECONDS) or self._problem is not None:
            raise BrokerError(
                f"the embedded broker cannot start: {_root(self._problem) if self._problem else 'it takes too long'}",
                where=f"{self.host}:{self.port}",
                remedy="Choose another --listen, or use a broker that runs already: --broker",
            )

    def stop(self) -> None:
        """Disconnect all clients and stop the thread."""
        if self._done is not None:
            self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join(10.0)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._serve())
        except Exception as error:
            if self._started.is_set():
                log.exception("the embedded broker failed")
            self._problem = error
            self._started.set()
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from kedge.fleet.mqtt_listener import open_listener
            from kedge.fleet.patched_amqtt import MendedBroker
        # It logs each packet and each client's end; trouble that matters shows at the clients.
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        broker = MendedBroker(self._settings(), loop=self._loop)
        await broker.start()
        try:
            listener = await open_listener(broker, self.host, self.port)
            self._done = asyncio.Event()
            self._started.set()
            await self._done.wait()
            listener.close()
        finally:
            await broker.shutdown()

    def _settings(self) -> dict[str, Any]:
        return {
            "listeners": {"default": {"type": "external"}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        }


def _root(error: BaseException) -> BaseException:
    return _root(error.__cause__) if error.__cause__ is not None else error
