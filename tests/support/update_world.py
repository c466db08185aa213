"""A device's update machine with a real disk, and a controller and a network that a test may torment."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent import counters, persistent_state
from kedge_agent.counters import Counter
from kedge_agent.effects import EffectRunner, installed_of
from kedge_agent.proving import Proof, ProofLimits
from kedge_agent.serving.bundle_watch import ServingWatch
from kedge_agent.slots import ModelFolder, model_folders
from kedge_agent.store import Store
from kedge_agent.update import actions, events
from kedge_agent.update.desired_states import Identity
from kedge_agent.update.machine import Machine
from kedge_agent.update.settings import Settings
from kedge_protocol import codec, digest
from kedge_protocol.bitmaps import bit_is_set, decode_bitmap
from kedge_protocol.blocks import BLOCK_SIZE, BlockAnswer, BlockStatus, block_count, block_hash
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle import oci
from kedge_protocol.bundle.layout import Bundle, parse_bundle
from kedge_protocol.errors import EndpointError, VerificationError
from kedge_protocol.messages import BlobKind, BlockRequest, Desired, ModelState, ReportedModel, Shadow, Status
from kedge_protocol.trust import Trust

TARGET = "board"
GOLDEN = b"golden vectors stand here"


@dataclass(frozen=True)
class Release:
    """One bundle in a controller's hands."""

    digest: str
    size: int
    blobs: dict[str, bytes]
    files: dict[str, bytes]


def block_map(data: bytes) -> bytes:
    return b"".join(block_hash(data[at : at + BLOCK_SIZE]) for at in range(0, len(data), BLOCK_SIZE))


def make_release(
    files: Mapping[str, bytes],
    *,
    name: str = "digits",
    version: str = "1.0",
    target: str = TARGET,
    runtimes: tuple[cfg.RuntimeRequirement, ...] = (cfg.RuntimeRequirement(distribution="pytest", minimum="1"),),
    memory_bytes: int = 1,
    wrong_map: bool = False,
) -> Release:
    """A bundle whose documents are real; its files are any bytes (the test's prover knows what holds)."""
    all_files = {**files, "golden.npz": GOLDEN + version.encode()}
    layers = []
    for title, data in all_files.items():
        annotations = {oci.TITLE: title}
        if len(data) > BLOCK_SIZE:
            annotations[oci.BLOCKS] = digest.of_bytes(block_map(data))
        # A release packed wrong: its block map is that of the bytes, its digest is not.
        shown = digest.of_bytes(data + b"?") if wrong_map and len(data) > BLOCK_SIZE else digest.of_bytes(data)
        kind = oci.GOLDEN_TYPE if title == "golden.npz" else oci.FILE_TYPE
        layers.append(oci.Descriptor(media_type=kind, digest=shown, size=len(data), annotations=annotations))
    config = codec.encode(_config(name, version, target, runtimes, memory_bytes, next(iter(files)), layers[-1].digest))
    manifest = oci.Manifest(
        schema_version=2,
        config=oci.Descriptor(media_type=oci.CONFIG_TYPE, digest=digest.of_bytes(config), size=len(config)),
        layers=tuple(layers),
        artifact_type=oci.BUNDLE_TYPE,
    )
    raw = codec.encode(oci.plain(manifest))
    blobs = {layer.digest: data for layer, data in zip(layers, all_files.values(), strict=True)}
    blobs |= {digest.of_bytes(raw): raw, digest.of_bytes(config): config}
    return Release(digest.of_bytes(raw), len(raw), blobs, all_files)


def _config(
    name: str,
    version: str,
    target: str,
    runtimes: tuple[cfg.RuntimeRequirement, ...],
    memory_bytes: int,
    entry: str,
    golden: str,
) -> cfg.BundleConfig:
    file = cfg.FileTensor(name="x", index=0, shape=(1, 4), dtype="float32")
    spec = cfg.TensorSpec(name="x", shape=(None, 4), dtype="float32", file=file)
    return cfg.BundleConfig(
        schema_version=cfg.SCHEMA_VERSION,
        name=name,
        version=version,
        target=target,
        backend="any",
        entry=entry,
        precision="int8",
        runtimes=runtimes,
        inputs=(spec,),
        outputs=(spec,),
        metric=cfg.Metric(name="top1", value=1.0, reference=1.0, samples=8, measured_on="test"),
        resources=cfg.Resources(storage_bytes=1, memory_bytes=memory_bytes),
        provenance=cfg.Provenance(
            model_digest=golden, evaluation_digest=golden, calibration_samples=0, evaluation_samples=8, tools={}
        ),
        verified=cfg.Verified.EXECUTED,
        golden=cfg.GoldenRef(file="golden.npz", digest=golden, samples=8, kernel_sets=("one",)),
    )


def sample(seed: int, size: int) -> bytes:
    """Pseudo-random bytes."""
    return random.Random(seed).randbytes(size)


def opened(store: Store, data: bytes) -> list[int]:
    """Open a blob under way; the indices of its finished blocks."""
    hashes = block_map(data)
    event = store.open(digest.of_bytes(data), len(data), map_digest=digest.of_bytes(hashes), block_map=hashes)
    assert event.error is None
    assert event.block_map == hashes
    return [index for index in range(block_count(len(data))) if bit_is_set(event.have, index)]


def stored(state: Path, release: Release) -> tuple[Store, Bundle]:
    store = Store(state)
    for name, data in release.blobs.items():
        store.put(name, data)
    config = next(blob for blob in release.blobs.values() if b"schema_version" in blob)
    return store, parse_bundle(release.blobs[release.digest], config, where="test")


class Jobs:
    """Jobs that run when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def put(self, job: Callable[[], None]) -> None:
        self.waiting.append(job)

    def stop(self, patience: float) -> None:
        self.waiting.clear()

    def run_one(self) -> bool:
        if not self.waiting:
            return False
        self.waiting.pop(0)()
        return True


@dataclass
class Controller:
    """Answers requests from its blobs, and counts as the real one does."""

    blobs: dict[str, bytes] = field(default_factory=dict)
    boot: int = 1
    session: int = 1
    served: dict[tuple[str, BlobKind, int], int] = field(default_factory=dict)
    served_again: int = 0
    """Blocks served that the request itself, or one before it, called finished."""
    told: dict[str, bytes] = field(default_factory=dict)
    broken: Callable[[BlockRequest, int], bool] = lambda request, index: False
    refuse: Callable[[BlockRequest], BlockStatus | None] = lambda request: None

    @property
    def status(self) -> Status:
        return Status(online=True, boot_id=f"controller{self.boot}", session=self.session)

    def add(self, release: Release) -> Release:
        self.blobs |= release.blobs
        return release

    def answers(self, request: BlockRequest) -> list[BlockAnswer]:
        refusal = self.refuse(request)
        data = self.blobs.get(request.digest)
        if data is None or refusal is not None:
            status = refusal or BlockStatus.NOT_FOUND
            return [BlockAnswer(index, status, b"no such blob") for index in request.blocks]
        if request.kind is BlobKind.MAP:
            data = block_map(data)
        elif request.have:
            self.told[request.digest] = decode_bitmap(request.have, where="request")
        made = []
        for index in request.blocks:
            key = (request.digest, request.kind, index)
            self.served[key] = self.served.get(key, 0) + 1
            if request.kind is BlobKind.BLOB and bit_is_set(self.told.get(request.digest, b""), index):
                self.served_again += 1
            payload = data[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
            if self.broken(request, index):
                payload = bytes(byte ^ 1 for byte in payload[:100]) + payload[100:]
            made.append(BlockAnswer(index, BlockStatus.OK, payload))
        return made


class World:
    """A device, a network and a controller; nothing happens by itself."""

    def __init__(
        self, state: Path, *, settings: Settings | None = None, seed: int = 0, trust: Trust | None = None
    ) -> None:
        self.state = state
        self.trust = trust
        self.controller = Controller()
        self.chance = random.Random(seed)
        self.settings = settings or Settings(
            window=4, silence=20.0, serve_deadline=30.0, reserve_bytes=0, disk_deadline=86400.0, prove_deadline=86400.0
        )
        self.now = 1000.0
        self.online = False
        self.requests: list[tuple[str, BlockRequest]] = []
        self.answers: list[tuple[str, BlockAnswer]] = []
        self.reports = 0
        self.proof_fails: set[str] = set()
        self.proof_detail: str | None = None
        self.proof_ms = 1.5
        self.proof_times: dict[str, float] = {}
        """Version → what a call takes in its proof, where that is not ``proof_ms``."""
        self.proof_spread = 2.0
        self.serve_fails: set[str] = set()
        self.endpoint_wrong: set[str] = set()
        """Versions whose golden samples are answered wrongly."""
        self.endpoint_silent = False
        self.knocks = 0
        self.proofs = 0
        self.boots = 0
        self.log: list[actions.Action] = []
        self.start()

    # The device.

    def start(self) -> None:
        """Start the agent, as the daemon does."""
        self.boots += 1
        self.store = Store(self.state)
        self.disk, self.prover = Jobs(), Jobs()
        self.performer = EffectRunner(
            self.store,
            ProofLimits(),
            post=self.post,
            ask=self._ask,
            report=self._count_report,
            remember=lambda content: persistent_state.write(
                self.state, persistent_state.AgentFile(boots=1, memory=content)
            ),
            prover=self._prove,
            endpoint=self._knock,
            disk=self.disk,
            proofs=self.prover,
        )
        installed = {}
        for folder in model_folders(self.state):
            folder.prune()
            installed[folder.name] = installed_of(folder)
        self.machine = Machine(
            identity=Identity(device="dev", target=TARGET, trust=self.trust),
            boot_id=f"boot{self.boots}",
            memory=persistent_state.read(self.state).memory,
            installed=installed,
            settings=self.settings,
            seed=self.boots,
            now=self.now,
        )
        self.watch = ServingWatch(self.state, None)
        self._perform(self.machine.start(self.now))

    def crash(self) -> None:
        """SIGKILL and a new start: what is on disk stays."""
        self.requests.clear()
        self.answers.clear()
        self.online = False
        for file in self.store._files.values():
            import os

            os.close(file)
        self.start()

    def post(self, event: events.Event) -> None:
        self._perform(self.machine.handle(event, self.now))

    def _perform(self, wanted: list[actions.Action]) -> None:
        self.log += wanted
        self.performer.run(wanted)

    def _ask(self, action: actions.RequestBlocks) -> None:
        # The promise that matters most: nothing that is finished on disk is ever asked for.
        request = action.request
        if request.kind is BlobKind.BLOB:
            have = decode_bitmap(request.have, where="request")
            assert not [index for index in request.blocks if bit_is_set(have, index)]
            partial = self.state / "partial" / digest.hex_of(request.digest)
            blob = self.controller.blobs.get(request.digest)
            if partial.exists() and blob is not None:
                on_disk = partial.read_bytes()
                for index in request.blocks:
                    place = slice(index * BLOCK_SIZE, (index + 1) * BLOCK_SIZE)
                    assert on_disk[place] != blob[place], f"block {index} is on disk and was asked for"
        if self.online:
            self.requests.append((action.rid, request))

    def _count_report(self) -> None:
        self.reports += 1

    def _prove(
        self,
        folder: Path,
        config: cfg.BundleConfig,
        limits: ProofLimits,
        cache: Path | None,
        tell: Callable[[str], None],
    ) -> Proof:
        self.proofs += 1
        tell("building, 1 of 2")
        if config.version in self.proof_fails:
            raise VerificationError("golden vectors do not hold")
        taken = self.proof_times.get(config.version, self.proof_ms)
        return Proof(self.proof_detail, taken, self.proof_spread * taken, calls=10)

    def _knock(self, folder: ModelFolder, bundle: str) -> int:
        self.knocks += 1
        slot = folder.current()
        if self.endpoint_silent or slot is None or slot.digest != bundle:
            raise EndpointError("nobody answers")
        if slot.bundle().config.version in self.endpoint_wrong:
            raise VerificationError("golden vectors do not hold")
        return 8

    def call(self, name: str = "digits", times: int = 1) -> None:
        """Let users call a model, if it serves."""
        slot = self.folder(name).current()
        if slot is None:
            return
        counter = Counter(self.folder(name).counters, digest=slot.digest, generation=0)
        for _ in range(times):
            counter.record(1000)
        counter.close()

    def count_calls(self) -> None:
        """Tell the machine of what was counted, as the daemon does."""
        for name, bundle in self.machine.unattested().items():
            counted = counters.collect(self.folder(name).counters).digests.get(bundle, 0)
            self.post(events.Counted(name, bundle, counted))

    @property
    def models(self) -> dict[str, ReportedModel]:
        return self.machine.reported()

    def folder(self, name: str = "digits") -> ModelFolder:
        return ModelFolder(self.state, name)

    def files(self, name: str = "digits") -> dict[str, bytes]:
        """The files of the current slot."""
        slot = self.folder(name).current()
        assert slot is not None
        return {title: (slot.folder / title).read_bytes() for title in slot.bundle().files}

    def run_disk(self) -> None:
        """Do all that waits for the disk."""
        while self.disk.run_one():
            pass

    # The network.

    def connect(self) -> None:
        self.online = True
        self.post(events.Connected())
        self.post(events.ControllerSeen(self.controller.status))

    def disconnect(self) -> None:
        self.online = False
        self.requests.clear()
        self.answers.clear()
        self.post(events.Disconnected())

    def restart_controller(self, *, new_boot: bool) -> None:
        self.requests.clear()
        self.answers.clear()
        if new_boot:
            self.controller.boot += 1
            self.controller.session = 1
        else:
            self.controller.session += 1
        if self.online:
            self.post(events.ControllerSeen(self.controller.status))

    def controller_leaves(self) -> None:
        self.requests.clear()
        self.answers.clear()
        status = self.controller.status
        self.post(events.ControllerSeen(Status(online=False, boot_id=status.boot_id, session=status.session)))

    def desire(
        self,
        version: int,
        *releases: Release,
        names: tuple[str, ...] = ("digits",),
        soak: float = 0.0,
        shadow: Release | None = None,
        rival: Release | None = None,
        order: int | None = None,
    ) -> None:
        models = dict(zip(names, [release.digest for release in releases], strict=False))
        sizes = {release.digest: release.size for release in releases}
        soaks = dict.fromkeys(models, soak)
        shadows = {} if shadow is None else {names[0]: Shadow(digest=shadow.digest, size=shadow.size)}
        rivals = {} if rival is None else {names[0]: rival.digest}
        sizes |= {} if rival is None else {rival.digest: rival.size}
        orders = {} if order is None else dict.fromkeys(models, order)
        desired = Desired(
            version=version, models=models, sizes=sizes, soaks=soaks, shadows=shadows, rivals=rivals, orders=orders
        )
        self.post(events.DesiredArrived(codec.encode(desired)))

    def serve_request(self) -> bool:
        if not self.requests:
            return False
        rid, request = self.requests.pop(0)
        self.answers += [(rid, answer) for answer in self.controller.answers(request)]
        return True

    def deliver(self, position: int = 0, *, twice: bool = False) -> bool:
        if not self.answers:
            return False
        rid, answer = self.answers[position] if twice else self.answers.pop(position)
        self.post(events.BlockArrived(rid, answer))
        return True

    def look_at_serving(self) -> None:
        for event in self.watch.look():
            if event.digest in self.serve_fails:
                event = events.Served(event.model, event.digest, "the runtime refuses it")
            self.post(event)

    def tick(self, seconds: float = 0.25) -> None:
        self.now += seconds
        self.look_at_serving()
        self.count_calls()
        self.post(events.Tick())

    def settle(self, steps: int = 5000) -> None:
        """Let everything run its healthy course until nothing is left to do."""
        for _ in range(steps):
            if self.disk.run_one() or self.prover.run_one() or self.serve_request() or self.deliver():
                continue
            if self.machine.settled and not self.disk.waiting:
                return
            self.tick(1.0)
        raise AssertionError(f"not settled: {self.models}")


def serving(world: World, release: Release, name: str = "digits") -> None:
    """Assert that a release serves with the right bytes."""
    model = world.models[name]
    assert (model.state, model.digest, model.proved) == (ModelState.SERVING, release.digest, True), model
    assert world.files(name) == release.files
