"""A device that does what the test says: bare paho, none of Kedge's own agent or connection."""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
from collections.abc import Iterable
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from kedge_protocol import codec, topics
from kedge_protocol.bitmaps import encode_bitmap
from kedge_protocol.blocks import BlockAnswer, decode_answer
from kedge_protocol.errors import MessageError
from kedge_protocol.messages import (
    BlobKind,
    BlockRequest,
    Desired,
    Failure,
    ModelState,
    RefusedDesired,
    Reported,
    ReportedModel,
    Status,
    decode_desired,
)
from tests.support.waiting import wait_for


def bitmap_of(finished: Iterable[int]) -> bytes:
    """The bitmap of a set of block indices."""
    bits = bytearray()
    for index in finished:
        byte = index >> 3
        if byte >= len(bits):
            bits.extend(bytes(byte + 1 - len(bits)))
        bits[byte] |= 1 << (index & 7)
    return bytes(bits)


class ScriptedAgent:
    """One device at the broker; a context manager.

    Attributes:
        desired: retained desired states in the order they came.
        statuses: the controller's.
        answers: blocks and refusals as they came, with the request's number.
        blocks: payloads by (digest, kind, index), in the order they came.
    """

    def __init__(self, name: str, port: int, *, boot: str = "boot-1", session: int = 1) -> None:
        self.name = name
        self.boot = boot
        self.session = session
        self.desired: list[Desired] = []
        self.cleared = 0
        self.statuses: list[Status] = []
        self.answers: list[tuple[str, BlockAnswer]] = []
        self.blocks: dict[tuple[str, BlobKind, int], list[bytes]] = {}
        self._port = port
        self._asked: dict[str, tuple[str, BlobKind]] = {}
        self._numbers = itertools.count(1)
        self._seq = itertools.count(1)
        self._subscribed = threading.Event()
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=f"{name}-{boot}-{session}", protocol=MQTTProtocolVersion.MQTTv311
        )
        self.client.will_set(topics.status(name), self._status(online=False), qos=1, retain=True)
        self.client.on_connect = self._connected
        self.client.on_subscribe = lambda *_: self._subscribed.set()
        self.client.on_message = self._message

    def __enter__(self) -> ScriptedAgent:
        self.client.connect("127.0.0.1", self._port)
        self.client.loop_start()
        wait_for(self._subscribed.is_set, what=f"{self.name}'s subscription")
        return self

    def __exit__(self, *_: object) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def lose(self) -> None:
        """Break the connection without a word: the broker sends the will."""
        self.client.loop_stop()
        sock = self.client.socket()
        if sock is not None:
            sock.close()

    def _status(self, *, online: bool) -> bytes:
        return codec.encode(Status(online=online, boot_id=self.boot, session=self.session))

    def birth(self) -> None:
        """Say that it is there."""
        self.client.publish(topics.status(self.name), self._status(online=True), qos=1, retain=True)

    def _connected(self, client: paho.Client, *_: Any) -> None:
        client.subscribe(
            [(topics.desired(self.name), 1), (topics.block(self.name, "+"), 0), (topics.CONTROLLER_STATUS, 1)]
        )

    def _message(self, _: paho.Client, __: object, message: paho.MQTTMessage) -> None:
        payload = bytes(message.payload)
        if message.topic == topics.CONTROLLER_STATUS:
            with contextlib.suppress(MessageError):
                self.statuses.append(codec.decode(payload, Status, where="status"))
        elif message.topic == topics.desired(self.name):
            if payload:
                self.desired.append(decode_desired(payload, where="desired"))
            else:
                self.cleared += 1
        elif message.topic.startswith(topics.block(self.name, "")):
            rid = message.topic.rpartition("/")[2]
            answer = decode_answer(payload)
            digest, kind = self._asked[rid]
            if not answer.reason:
                self.blocks.setdefault((digest, kind, answer.index), []).append(bytes(answer.payload))
            self.answers.append((rid, answer))

    def ask(
        self, digest: str, blocks: Iterable[int], *, kind: BlobKind = BlobKind.BLOB, have: Iterable[int] = ()
    ) -> str:
        """Ask for blocks; returns the request's number."""
        request = BlockRequest(
            digest=digest,
            kind=kind,
            blocks=list(blocks),
            have=encode_bitmap(bitmap_of(have)),
            boot_id=self.boot,
        )
        rid = f"{self.boot}-{next(self._numbers)}"
        self._asked[rid] = (digest, kind)
        self.client.publish(topics.request(self.name, rid), codec.encode(request))
        return rid

    def fetch(
        self, digest: str, blocks: Iterable[int], *, kind: BlobKind = BlobKind.BLOB, have: Iterable[int] = ()
    ) -> bytes:
        """Ask for blocks, wait for all of them, and return them joined."""
        wanted = list(blocks)
        seen = {index: len(self.blocks.get((digest, kind, index), ())) for index in wanted}
        self.ask(digest, wanted, kind=kind, have=have)
        wait_for(
            lambda: all(len(self.blocks.get((digest, kind, index), ())) > seen[index] for index in wanted),
            what=f"blocks {wanted} of {digest[:19]}",
        )
        return b"".join(self.blocks[digest, kind, index][-1] for index in wanted)

    def report(
        self,
        version: int,
        models: dict[str, ReportedModel] | None = None,
        *,
        target: str = "rpi4",
        refused: RefusedDesired | None = None,
    ) -> None:
        """Publish a reported state that answers this desired version."""
        reported = Reported(
            boot_id=self.boot,
            seq=next(self._seq),
            target=target,
            agent_version="0",
            architecture="aarch64",
            python="3.11",
            runtimes={},
            free_bytes=1 << 30,
            desired_version=version,
            models=models or {},
            refused=refused,
        )
        self.client.publish(topics.reported(self.name), codec.encode(reported), qos=1, retain=True)

    def say(self, kind: str, payload: bytes, *, retain: bool = False) -> None:
        """Publish any bytes below the device's own topics."""
        self.client.publish(f"{topics.ROOT}/d/{self.name}/{kind}", payload, qos=1, retain=retain)

    def telemetry(self, seq: int, **other: object) -> None:
        """Publish a telemetry message."""
        fields = {
            "boot_id": self.boot,
            "seq": seq,
            "interval": 5.0,
            "models": {},
            "cpu_percent": 1.0,
            "memory_total_bytes": 100,
            "memory_available_bytes": 50,
            "agent_bytes": 10,
            "free_bytes": 5,
        }
        self.say("tele/metrics", json.dumps(fields | other).encode())


def serving(digest: str, *, proved: bool = True, version: str = "1.0") -> ReportedModel:
    """A model that serves."""
    return ReportedModel(state=ModelState.SERVING, desired=digest, digest=digest, version=version, proved=proved)


def failed(digest: str, reason: str, *, still: str | None = None) -> ReportedModel:
    """A model whose wanted bundle was refused; ``still`` goes on serving."""
    return ReportedModel(
        state=ModelState.FAILED,
        desired=digest,
        digest=still,
        proved=still is not None,
        failure=Failure(digest=digest, stage="prove", reason=reason),
    )
