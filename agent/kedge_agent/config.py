"""``agent.toml``: the device's name, the broker's address, and the agent's limits. Unknown keys are errors."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from kedge_agent.proving import ProofLimits
from kedge_agent.samples.runner import SampleLimits
from kedge_agent.serving.settings import ServerSettings, checked_access, checked_exposure
from kedge_agent.shadow.runner import ShadowLimits
from kedge_agent.slots import default_state
from kedge_agent.split.settings import SplitSettings
from kedge_agent.update.settings import MAX_SECONDS, Settings
from kedge_protocol import addresses, codec, credentials, toml
from kedge_protocol.broker import Broker, parse_broker
from kedge_protocol.errors import ConfigError, MessageError
from kedge_protocol.samples import MAX_BYTES, MAX_COUNT
from kedge_protocol.samples import MAX_SECONDS as MAX_SAMPLE_SECONDS
from kedge_protocol.topics import checked_name
from kedge_protocol.trust import Trust


@dataclass(frozen=True, kw_only=True)
class DeviceTable:
    """``[device]``: the device's name, as the controller knows it, and its target.

    Attributes:
        target: name of a target, or path of a board's own ``.toml``.
    """

    name: str
    target: str


@dataclass(frozen=True, kw_only=True)
class BrokerTable:
    """``[broker]``: paths are relative to the configuration file.

    Attributes:
        url: ``mqtt://host[:port]`` or ``mqtts://host[:port]``.
        password_file: file whose first line is the password; better than ``password``.
    """

    url: str
    ca: str | None = None
    cert: str | None = None
    key: str | None = None
    username: str | None = None
    password: str | None = None
    password_file: str | None = None


@dataclass(frozen=True, kw_only=True)
class StateTable:
    """``[state]``: the folder in which the agent keeps everything."""

    path: str | None = None


@dataclass(frozen=True, kw_only=True)
class ServeTable:
    """``[serve]``: HTTP for clients of this device (Open Inference Protocol v2).

    Attributes:
        listen: ``host:port``; beyond loopback it needs a token file, a client CA or ``insecure``.
        socket: path of an additional Unix socket.
        grpc: ``host:port`` of a gRPC server; needs the extra ``grpc``.
        token_file: file with the token that clients send as ``Authorization: Bearer``.
        tls_cert, tls_key, tls_client_ca: PEM files; with a client CA every client must present a certificate.
        cors_origins: origins whose web pages may call.
        allowed_hosts: names under which clients may call, besides localhost and IP addresses, as behind a proxy.
        call_seconds: a call that takes longer is answered with 503 and counts as hung.
        body_mib: largest body of one request, decompressed.
        memory_mib: memory above which the serving process is restarted; 0 for half of the device's.
        cache_mib: memory for answers that are kept and given again to requests with the same bytes; 0 keeps none.
        cascade: whether inputs may go to the larger models that bundles name.
    """

    enabled: bool = True
    listen: str = "127.0.0.1:8080"
    socket: str | None = None
    grpc: str | None = None
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_client_ca: str | None = None
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    insecure: bool = False
    call_seconds: float = 30.0
    body_mib: int = 32
    memory_mib: int = 0
    cache_mib: int = 0
    cascade: bool = False


@dataclass(frozen=True, kw_only=True)
class LimitsTable:
    """``[limits]``: see :class:`kedge_agent.update.settings.Settings`.

    Attributes:
        serve_seconds: deadline for the serving process to load a bundle; a call that takes three times as long counts
            as hung.
        hang_seconds: time without a sign of life after which the serving process is killed and restarted.
        prove_seconds: deadline for the golden vectors.
        prepare_seconds: deadline for what a backend builds on the device before the golden vectors.
        prove_mib: memory limit of the worker that runs the golden vectors; 0 for none.
        memory_mib: memory that the agent and its children may take; what would not fit is refused. 0 for all.
        reserve_mib: free disk space that a download must leave.
        kib_per_second: rate limit of downloads; 0 for none.
    """

    window: int = 16
    silence_seconds: float = 20.0
    serve_seconds: float = 60.0
    hang_seconds: float = 10.0
    prove_seconds: float = 120.0
    prepare_seconds: float = 3600.0
    prove_mib: int = 0
    memory_mib: int = 0
    reserve_mib: int = 16
    kib_per_second: int = 0


@dataclass(frozen=True, kw_only=True)
class TelemetryTable:
    """``[telemetry]``: seconds between two messages; 0 sends none."""

    interval: float = 5.0


@dataclass(frozen=True, kw_only=True)
class ShadowTable:
    """``[shadow]``: what a shadow may take on this device at most, whatever the fleet asks for.

    Attributes:
        share: share of one processor core; 0 allows no shadows.
        memory_mib: resident memory.
    """

    share: float = 0.25
    memory_mib: int = 1024


@dataclass(frozen=True, kw_only=True)
class SamplesTable:
    """``[samples]``: the inputs that this device sends home when the fleet's operator asks for hard cases
    (``kedge samples request``). It needs ``[trust]``: only a signed request is followed.

    Attributes:
        allow: whether it sends any.
        count: samples of one request at most.
        mib: mebibytes of one request at most.
        mib_per_day: of all requests within 24 hours.
        hours: how long it looks for one request at most.
    """

    allow: bool = False
    count: int = 200
    mib: float = 8.0
    mib_per_day: float = 32.0
    hours: float = 24.0


@dataclass(frozen=True, kw_only=True)
class TrustTable:
    """``[trust]``: whose releases and desired states are taken.

    Attributes:
        file: the keys that the kit gave (``trust.json``); without one, unsigned desired states are taken.
    """

    file: str | None = None


@dataclass(frozen=True, kw_only=True)
class _File:
    device: DeviceTable
    broker: BrokerTable
    state: StateTable = field(default_factory=StateTable)
    serve: ServeTable = field(default_factory=ServeTable)
    limits: LimitsTable = field(default_factory=LimitsTable)
    telemetry: TelemetryTable = field(default_factory=TelemetryTable)
    shadow: ShadowTable = field(default_factory=ShadowTable)
    samples: SamplesTable = field(default_factory=SamplesTable)
    trust: TrustTable = field(default_factory=TrustTable)
    split: SplitSettings = field(default_factory=SplitSettings)


@dataclass(frozen=True, kw_only=True)
class AgentConfig:
    """A checked configuration.

    Attributes:
        name, target: name and target of the device; ``distributions``: runtimes to look for and report.
        listen: address of the serving process; None if it is off. ``serve_socket``: path of its Unix socket.
        server: settings of the HTTP server.
        serve_memory_bytes: memory above which the serving process is restarted; 0 for half of the device's.
        hang_seconds: time without a sign of life after which the serving process is killed.
        memory_bytes: what the agent and its children may take together; 0 for what the device has.
        telemetry_interval: seconds between two messages; 0 for none.
        shadow: what shadows may take.
        samples: which samples may be sent home.
        trust: the keys that the kit gave; None to take unsigned desired states.
        split: where the other parts of split models are.
    """

    name: str
    target: str
    distributions: tuple[str, ...]
    broker: Broker
    state: Path
    listen: str | None = "127.0.0.1:8080"
    serve_socket: str | None = None
    server: ServerSettings = field(default_factory=ServerSettings)
    serve_memory_bytes: int = 0
    hang_seconds: float = 10.0
    memory_bytes: int = 0
    update: Settings = field(default_factory=Settings)
    proof: ProofLimits = field(default_factory=ProofLimits)
    telemetry_interval: float = 5.0
    shadow: ShadowLimits = field(default_factory=ShadowLimits)
    samples: SampleLimits = field(default_factory=SampleLimits)
    trust: Trust | None = None
    split: SplitSettings = field(default_factory=SplitSettings)


def read(path: Path) -> AgentConfig:
    """Read and check ``agent.toml``.

    Raises:
        ConfigError: the file is missing or not TOML, a key is unknown, missing or of the wrong type, or a value is out
            of bounds; the message names it.
        TargetError: the board's own target file is missing or broken.
    """
    file = codec.structure(toml.read(path, ConfigError), _File, where=str(path), strict=True)
    try:
        return _checked(file, path.resolve().parent)
    except ConfigError as error:
        where = str(path) if error.where is None else f"{path}: {error.where}"
        raise ConfigError(error.what, where=where, remedy=error.remedy) from error


def _checked(file: _File, folder: Path) -> AgentConfig:
    limits, interval = file.limits, file.telemetry.interval
    if not (interval == 0 or 0.2 <= interval <= 86400):
        raise ConfigError(f"telemetry.interval is {interval} s", remedy="Use 0 (off), or 0.2 to 86400")
    sizes = (limits.prove_mib, limits.memory_mib, limits.reserve_mib)
    if limits.prove_seconds <= 0 or limits.prepare_seconds <= 0 or min(sizes) < 0:
        raise ConfigError("limits must not be negative")
    if not 0 <= file.shadow.share <= 1 or file.shadow.memory_mib < 0:
        raise ConfigError("shadow.share or shadow.memory_mib is out of range", remedy="Use a share of 0 to 1")
    if not 2 <= limits.hang_seconds <= MAX_SECONDS:
        raise ConfigError(f"limits.hang_seconds is {limits.hang_seconds} s", remedy=f"Use 2 to {MAX_SECONDS:g}")
    server = _server(file.serve, folder, limits.serve_seconds)
    target, distributions = _target(file.device.target, folder)
    return AgentConfig(
        name=checked_name(file.device.name, "device name"),
        target=target,
        distributions=distributions,
        broker=_broker(file.broker, folder),
        state=folder / file.state.path if file.state.path else default_state(),
        listen=file.serve.listen if file.serve.enabled else None,
        serve_socket=None if file.serve.socket is None else str(folder / file.serve.socket),
        server=server,
        serve_memory_bytes=file.serve.memory_mib << 20,
        hang_seconds=limits.hang_seconds,
        memory_bytes=limits.memory_mib << 20,
        update=Settings(
            window=limits.window,
            silence=limits.silence_seconds,
            serve_deadline=limits.serve_seconds,
            # The worker keeps its own two limits; this one is for the case that it cannot.
            prove_deadline=min(limits.prove_seconds + limits.prepare_seconds + 180.0, MAX_SECONDS),
            reserve_bytes=limits.reserve_mib << 20,
            bytes_per_second=limits.kib_per_second << 10,
        ),
        proof=ProofLimits(
            deadline=limits.prove_seconds,
            prepare_deadline=limits.prepare_seconds,
            memory_bytes=limits.prove_mib << 20 if limits.prove_mib else None,
        ),
        telemetry_interval=interval,
        shadow=ShadowLimits(share=file.shadow.share, memory_bytes=file.shadow.memory_mib << 20),
        samples=_samples(file.samples),
        trust=None if file.trust.file is None else _trust(folder / file.trust.file),
        split=_split(file.split, file.broker, folder),
    )


def _samples(table: SamplesTable) -> SampleLimits:
    megabytes = (table.mib, table.mib_per_day)
    if not 1 <= table.count <= MAX_COUNT or any(not 0 < one <= MAX_BYTES >> 20 for one in megabytes):
        raise ConfigError(
            "samples.count, samples.mib or samples.mib_per_day is out of range",
            remedy=f"Use a count of 1 to {MAX_COUNT}, and more than 0 up to {MAX_BYTES >> 20} MiB",
        )
    if not 0 < table.hours * 3600 <= MAX_SAMPLE_SECONDS:
        raise ConfigError(f"samples.hours is {table.hours}", remedy=f"Use up to {MAX_SAMPLE_SECONDS / 3600:g}")
    return SampleLimits(
        allow=table.allow,
        count=table.count,
        max_bytes=int(table.mib * (1 << 20)),
        bytes_per_day=int(table.mib_per_day * (1 << 20)),
        seconds=table.hours * 3600,
    )


def _split(table: SplitSettings, broker: BrokerTable, folder: Path) -> SplitSettings:
    own = table.cert is not None
    files = (table.ca, table.cert, table.key) if own else (broker.ca, broker.cert, broker.key)
    # An authority of the system's is one for servers, not for devices.
    usable = files[0] is not None and files[1] is not None
    ca, cert, key = (str((folder / one).absolute()) if usable and one is not None else None for one in files)
    return replace(table, ca=ca, cert=cert, key=key).checked()


def _trust(path: Path) -> Trust:
    try:
        return codec.decode(credentials.read(path, "the file of trusted keys"), Trust, where=str(path)).check()
    except (ConfigError, MessageError) as error:
        raise ConfigError(error.what, where=error.where, remedy="Make the device's kit again") from error


def _server(table: ServeTable, folder: Path, load_seconds: float) -> ServerSettings:
    def path(name: str | None) -> str | None:
        return None if name is None else str(folder / name)

    if not 0.1 <= table.call_seconds <= MAX_SECONDS or min(table.memory_mib, table.cache_mib, table.body_mib - 1) < 0:
        raise ConfigError(
            "serve.call_seconds, body_mib, memory_mib or cache_mib is out of range",
            remedy=f"Use 0.1 to {MAX_SECONDS:g} s, at least 1 MiB for a body and 0 for the others",
        )
    settings = ServerSettings(
        call_seconds=table.call_seconds,
        max_body_bytes=table.body_mib << 20,
        # What takes three times as long as a load may take is not slow, it hangs.
        load_seconds=3 * load_seconds,
        token_file=path(table.token_file),
        tls_cert=path(table.tls_cert),
        tls_key=path(table.tls_key),
        tls_client_ca=path(table.tls_client_ca),
        cors_origins=table.cors_origins,
        allowed_hosts=table.allowed_hosts,
        grpc_listen=table.grpc,
        cache_bytes=table.cache_mib << 20,
        cascade=table.cascade,
    )
    if table.enabled:
        addresses.parse(table.listen, where="serve.listen")
        settings.token()
        checked_access(settings)
        for address in (table.listen, *([table.grpc] if table.grpc else ())):
            checked_exposure(address, settings, insecure=table.insecure)
    return settings


def _target(given: str, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Return the target's name and the runtimes to look for: its own, or those of every target known here."""
    from kedge_targets import target as targets

    if given.endswith(".toml"):
        board = targets.read(folder / given)
        return board.name, tuple(board.runtimes)
    names = [given] if given in targets.names() else targets.names()
    known = {distribution for name in names for distribution in targets.find(name).runtimes}
    return checked_name(given, "target name"), tuple(sorted(known))


def _broker(table: BrokerTable, folder: Path) -> Broker:
    password = table.password
    if table.password_file is not None:
        if password is not None:
            raise ConfigError("broker.password and broker.password_file are both given", remedy="Keep one")
        password = credentials.read_password(folder / table.password_file)

    def path(name: str | None) -> Path | None:
        return None if name is None else folder / name

    return parse_broker(
        table.url,
        ca=path(table.ca),
        cert=path(table.cert),
        key=path(table.key),
        username=table.username,
        password=password,
    )
