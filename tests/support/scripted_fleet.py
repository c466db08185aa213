"""Many devices in one process: one thread, one connection each, bare paho and none of Kedge's own agent or connection.

Each device does what an agent does on the wire and no more: birth, will, telemetry, and for a desired state the pull of
every blob by its blocks, checked by digest, with reports on the way. What is lost is asked for again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from kedge.simulator.loop import Loop
from kedge_protocol import codec, topics
from kedge_protocol.blocks import block_count, decode_answer
from kedge_protocol.errors import MessageError
from kedge_protocol.messages import (
    BlobKind,
    BlockRequest,
    Desired,
    Latency,
    ModelState,
    ModelTelemetry,
    Reported,
    ReportedModel,
    Status,
    Telemetry,
    decode_desired,
)

ASK_AGAIN_SECONDS = 3.0
"""An answer that did not come by then is asked for again; then twice as long, and so on."""
RECONNECT_SECONDS = (0.3, 1.5)
"""Between two attempts, drawn from here."""
BLOCKS_A_REQUEST = 64
_KEEPALIVE = 30


@dataclass
class Pull:
    """A blob on its way."""

    digest: str
    size: int
    blocks: dict[int, bytes] = field(default_factory=dict)
    rids: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        """Indices that did not come yet."""
        return [index for index in range(block_count(self.size)) if index not in self.blocks]

    def data(self) -> bytes:
        """All blocks, joined."""
        return b"".join(self.blocks[index] for index in sorted(self.blocks))


class ScriptedDevice:
    """One device of a :class:`ScriptedFleet`; only the fleet's thread changes it.

    Attributes:
        version: of the desired state that it answered last.
        serving: model name → bundle digest, each pulled whole and checked.
        refused: answers that were no blocks, in words.
        connects, losses: how often it came to the broker, and was put out by it.
        sent, heard: messages.
    """

    def __init__(self, fleet: ScriptedFleet, name: str, target: str, boot: str) -> None:
        self.fleet = fleet
        self.name = name
        self.target = target
        self.boot = boot
        self.version = 0
        self.serving: dict[str, str] = {}
        self.refused: list[str] = []
        self.connects = self.losses = self.sent = self.heard = 0
        self.online = False
        self._session = 0
        self._seq = itertools.count(1)
        self._numbers = itertools.count(1)
        self._telemetry_seq = itertools.count(1)
        self._desired: Desired | None = None
        self._pulls: list[Pull] = []
        self._wanted: tuple[str, str] | None = None
        self._controller = ""
        self._subscriptions = 0
        self.client: paho.Client | None = None

    # The connection.

    def connect(self) -> None:
        """One attempt; the fleet tries again after a loss."""
        self._session += 1
        self.online = False
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.name,
            protocol=MQTTProtocolVersion.MQTTv311,
            reconnect_on_failure=False,
        )
        client.max_queued_messages_set(0)
        client.will_set(topics.status(self.name), self._status(online=False), qos=1, retain=True)
        client.on_connect = self._connected
        client.on_subscribe = self._subscribed
        client.on_message = self._message
        self.fleet.loop.attach(self, client)
        self.client = client
        try:
            client.connect("127.0.0.1", self.fleet.port, keepalive=_KEEPALIVE)
        except OSError:
            self.fleet.loop.detach(client)
            self.lost()

    def ended(self, client: paho.Client) -> None:
        """Learn that a client, perhaps an earlier one, lost its connection."""
        if self.client is client:
            self.lost()

    def lost(self) -> None:
        """The connection ended; come back a little later."""
        self.client = None
        if self.online:
            self.losses += 1
        self.online = False
        if not self.fleet.stopping:
            self.fleet.loop.later(random.uniform(*RECONNECT_SECONDS), self.connect)

    def _connected(self, client: paho.Client, _: object, __: object, reason: Any, ___: object) -> None:
        if not reason.is_failure:
            client.subscribe(
                [(topics.desired(self.name), 1), (topics.block(self.name, "+"), 0), (topics.CONTROLLER_STATUS, 1)]
            )

    def _subscribed(self, *_: object) -> None:
        self.online = True
        self.connects += 1
        self._publish(topics.status(self.name), self._status(online=True), qos=1, retain=True)
        self.report()
        self._ask_all()

    def _status(self, *, online: bool) -> bytes:
        return codec.encode(Status(online=online, boot_id=self.boot, session=self._session, at=time.time()))

    def _publish(self, topic: str, payload: bytes, *, qos: int = 0, retain: bool = False) -> None:
        if self.client is not None and self.online:
            self.sent += 1
            self.client.publish(topic, payload, qos=qos, retain=retain)

    # What it hears.

    def _message(self, _: paho.Client, __: object, message: paho.MQTTMessage) -> None:
        self.heard += 1
        with contextlib.suppress(MessageError):
            if message.topic == topics.CONTROLLER_STATUS:
                self._controller_seen(codec.decode(message.payload, Status, where="status"))
            elif message.topic == topics.desired(self.name):
                if message.payload:
                    self._desired_came(decode_desired(message.payload, where="desired"))
            else:
                self._block_came(message.topic.rpartition("/")[2], message.payload)

    def _controller_seen(self, status: Status) -> None:
        if status.online and status.boot_id != self._controller:
            self._controller = status.boot_id
            self._ask_all()

    def _desired_came(self, desired: Desired) -> None:
        if desired.version <= self.version:
            self.report()
            return
        self.version, self._desired = desired.version, desired
        self._pulls, self._wanted = [], None
        self.serving = {model: digest for model, digest in self.serving.items() if model in desired.models}
        self._next_model()

    def _next_model(self) -> None:
        """Begin the next bundle that is wanted and not there."""
        if self._desired is None:
            return
        for model, digest in sorted(self._desired.models.items()):
            if self.serving.get(model) != digest:
                self._wanted = (model, digest)
                self._pulls = [Pull(digest, self._desired.sizes[digest])]
                self.report(ModelState.FETCHING)
                self._ask(self._pulls[0])
                return
        self._wanted = None
        self.report()

    def _block_came(self, rid: str, payload: bytes) -> None:
        answer = decode_answer(payload)
        pull = next((one for one in self._pulls if rid in one.rids), None)
        if pull is None:
            return
        if answer.reason:
            self.refused.append(answer.reason)
            return
        pull.blocks[answer.index] = bytes(answer.payload)
        if not pull.missing:
            self._blob_came(pull)

    def _blob_came(self, pull: Pull) -> None:
        data = pull.data()
        if "sha256:" + hashlib.sha256(data).hexdigest() != pull.digest:
            raise RuntimeError(f"{self.name}: {pull.digest} came with other bytes")
        if self._wanted is not None and pull.digest == self._wanted[1]:
            manifest = json.loads(data)
            parts = {layer["digest"]: layer["size"] for layer in (manifest["config"], *manifest["layers"])}
            self._pulls += [Pull(digest, size) for digest, size in parts.items() if size]
        self._pulls.remove(pull)
        if self._pulls:
            self._ask(self._pulls[0])
        elif self._wanted is not None:
            model, digest = self._wanted
            self.report(ModelState.PROVING)
            self.serving[model] = digest
            self._next_model()

    # What it says.

    def _ask_all(self) -> None:
        if self._pulls:
            self._ask(self._pulls[0])

    def _ask(self, pull: Pull) -> None:
        rid = f"{self.boot}-{next(self._numbers)}"
        pull.rids.append(rid)
        request = BlockRequest(
            digest=pull.digest, kind=BlobKind.BLOB, blocks=pull.missing[:BLOCKS_A_REQUEST], boot_id=self.boot
        )
        self._publish(topics.request(self.name, rid), codec.encode(request))
        # A slow controller must not be made slower: patience grows with each time.
        self.fleet.loop.later(ASK_AGAIN_SECONDS * 2 ** min(len(pull.rids) - 1, 4), lambda: self._ask_again(pull, rid))

    def _ask_again(self, pull: Pull, rid: str) -> None:
        if pull in self._pulls and pull.rids[-1] == rid:
            self._ask(pull)

    def report(self, state: ModelState | None = None) -> None:
        """Publish what it serves; ``state`` is where the wanted bundle stands."""
        models = {model: _serving(digest) for model, digest in self.serving.items()}
        if self._wanted is not None and state is not None:
            model, digest = self._wanted
            models[model] = ReportedModel(state=state, desired=digest, digest=self.serving.get(model))
        reported = Reported(
            boot_id=self.boot,
            seq=next(self._seq),
            target=self.target,
            agent_version="0",
            architecture="aarch64",
            python="3.11",
            runtimes={"onnxruntime": "1.20"},
            free_bytes=1 << 30,
            desired_version=self.version,
            models=models,
            at=time.time(),
        )
        self._publish(topics.reported(self.name), codec.encode(reported), qos=1, retain=True)

    def telemetry(self) -> None:
        """Publish a telemetry message, as large as an agent's with one model."""
        figures = ModelTelemetry(
            digest=next(iter(self.serving.values()), None),
            inferences=100,
            errors=0,
            inferences_total=1000,
            errors_total=1,
            latency_ms={"p50": 1.0, "p95": 1.5, "p99": 2.0, "mean": 1.1},
        )
        message = Telemetry(
            boot_id=self.boot,
            seq=next(self._telemetry_seq),
            interval=5.0,
            models={"tiny": figures},
            cpu_percent=random.uniform(0, 100),
            memory_total_bytes=1 << 30,
            memory_available_bytes=1 << 29,
            agent_bytes=40 << 20,
            free_bytes=1 << 30,
            temperature_c=50.0,
            at=time.time(),
        )
        self._publish(topics.telemetry(self.name, "metrics"), codec.encode(message))


class ScriptedFleet:
    """All devices on one broker; a context manager. Its thread owns the devices: look at them from outside, and change
    them by timers of its loop.

    Args:
        names: of the devices.
        port: of the broker on loopback.
        target: of all.
        boot: their boot id.
        telemetry: seconds between two messages of one device, spread evenly over the fleet; 0 for none.
    """

    def __init__(
        self, names: Iterable[str], port: int, *, target: str = "rpi4", boot: str = "boot-1", telemetry: float = 0.0
    ) -> None:
        self.port = port
        self.devices = {name: ScriptedDevice(self, name, target, boot) for name in names}
        self.telemetry = telemetry
        self.stopping = False
        self.loop = Loop()

    def __enter__(self) -> ScriptedFleet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Connect all."""
        for device in self.devices.values():
            self.loop.later(0.0, device.connect)
        if self.telemetry:
            self.set_telemetry(self.telemetry)
        self.loop.start()

    def stop(self) -> None:
        """Leave the broker; wills are sent, as for devices that lose power."""
        self.stopping = True
        self.loop.stop()

    def set_telemetry(self, seconds: float) -> None:
        """From now on each device sends telemetry every ``seconds``; 0 ends it."""
        self.telemetry = seconds
        if seconds:
            count = len(self.devices)
            for number, device in enumerate(self.devices.values()):
                self.loop.later(seconds * (number + 1) / count, lambda one=device: self._tell(one, seconds))

    def _tell(self, device: ScriptedDevice, seconds: float) -> None:
        if self.telemetry == seconds:
            device.telemetry()
            self.loop.later(seconds, lambda: self._tell(device, seconds))

    def online(self) -> int:
        """How many are at the broker."""
        return sum(device.online for device in self.devices.values())

    def serving(self, model: str, digest: str | None) -> int:
        """How many serve this bundle (or nothing, for None)."""
        return sum(device.serving.get(model) == digest for device in self.devices.values())


def _serving(digest: str) -> ReportedModel:
    return ReportedModel(
        state=ModelState.SERVING,
        desired=digest,
        digest=digest,
        version="1.0",
        proved=True,
        latency=Latency(bundle=digest, files=digest, p50_ms=1.0, p95_ms=1.5, calls=20),
    )
