"""The policy of a staged rollout: a small typed document, in TOML or by flags, checked before anything starts."""

from __future__ import annotations

import datetime
import enum
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedge.fleet.staged import selectors, times
from kedge.fleet.staged.gates import Gates
from kedge.fleet.staged.times import Window
from kedge.fleet.staged.waves import Size, parse_size
from kedge_protocol import codec, toml
from kedge_protocol.errors import ConfigError

MAX_SECONDS = 366 * 86400.0
MAX_WAVES = 100
_SPANS = ("soak", "max_soak", "progress_timeout", "deadline", "retry_after")


class OnAbort(str, enum.Enum):
    """What an aborted rollout does with the devices that it reached."""

    REVERT = "revert"
    KEEP = "keep"


class Undecided(str, enum.Enum):
    """What follows when the gates have not decided at the end of ``max_soak``."""

    HOLD = "hold"
    PROMOTE = "promote"
    ABORT = "abort"


class Approval(str, enum.Enum):
    """After which waves a person must promote."""

    NEVER = "never"
    FIRST = "first"
    EACH = "each"


class Late(str, enum.Enum):
    """Whether devices that meet the selector later are taken in."""

    OUT = "out"
    IN = "in"


class Busy(str, enum.Enum):
    """What follows when another rollout of the same model has some of the devices."""

    SUPERSEDE = "supersede"
    QUEUE = "queue"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a rollout goes out. Spans are seconds; in TOML they may be written ``15m``.

    Attributes:
        select: a selector, see :mod:`kedge.fleet.staged.selectors`; empty for all devices.
        devices: names; with them, only these.
        late: whether devices that meet the selector after the start are taken in, behind the last wave.
        waves: how far each wave reaches: ``10%`` or a number of devices, from the first device on.
        min_per_target: devices of each target that each wave holds at least, as long as there are any.
        seed: another one puts other devices into the first wave.
        shadow: share of a processor core that the new bundle may take beside the old one, on live inputs of the first
            wave's devices, for a soak time before they are switched; 0 for no shadow. The gate ``agreement`` decides.
        shadow_memory_mib: memory that it may take there.
        soak: how long the gates watch a wave after its last device has answered or is overdue.
        max_soak: how long at most, where the gates cannot decide; 0 for four times ``soak``, at least 10 minutes.
        undecided: what follows then.
        gates: thresholds, see :class:`kedge.fleet.staged.gates.Gates`.
        approval: after which waves a person must promote.
        on_abort: what an aborted rollout does with the devices that it reached.
        parallel: devices that are being updated at the same time; 0 for no limit.
        per_minute: devices that are told within a minute; 0 for no limit.
        progress_timeout: a device that shows no progress for so long is silent.
        deadline: so is one that does not serve this long after it was told.
        retries: how often a device that failed is told again, unless it refused the bundle itself (its check or its
            golden vectors).
        retry_after: seconds from a failure to the next try.
        not_before: seconds since 1970; in TOML a time with an offset.
        window: maintenance window in which devices may be told.
        busy: what follows when another rollout of the same model has some of the devices.
    """

    select: str = ""
    devices: tuple[str, ...] = ()
    late: Late = Late.OUT
    waves: tuple[str, ...] = ("1%", "10%", "50%", "100%")
    min_per_target: int = 5
    seed: str = ""
    shadow: float = 0.0
    shadow_memory_mib: int = 512
    soak: float = 600.0
    max_soak: float = 0.0
    undecided: Undecided = Undecided.HOLD
    gates: Gates = field(default_factory=Gates)
    approval: Approval = Approval.NEVER
    on_abort: OnAbort = OnAbort.REVERT
    parallel: int = 0
    per_minute: int = 0
    progress_timeout: float = 900.0
    deadline: float = 86400.0
    retries: int = 1
    retry_after: float = 60.0
    not_before: float = 0.0
    window: Window | None = None
    busy: Busy = Busy.SUPERSEDE

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The waves' sizes."""
        return tuple(parse_size(one) for one in self.waves)

    @property
    def longest_soak(self) -> float:
        """Seconds after which a soak ends without a decision of the gates."""
        return self.max_soak or max(4 * self.soak, 600.0)

    def check(self) -> Policy:
        """Return this policy if it is sound.

        Raises:
            ConfigError: it is not; all that is wrong is named.
        """
        problems = [*self._number_problems(), *self._wave_problems()]
        checks: list[Callable[[], Any]] = [lambda: selectors.parse(self.select), self.gates.check]
        if self.window is not None:
            checks.append(self.window.check)
        for check in checks:
            try:
                check()
            except ConfigError as error:
                problems.append(error.what + (f" ({error.remedy})" if error.remedy else ""))
        if problems:
            raise ConfigError("the policy does not fit: " + "; ".join(problems), remedy="Nothing was started")
        return self

    def _number_problems(self) -> list[str]:
        least = {"progress_timeout": 1.0, "deadline": 1.0, "min_per_target": 0}
        found = []
        for name in (*_SPANS, "parallel", "per_minute", "retries", "min_per_target"):
            value = getattr(self, name)
            if value < least.get(name, 0) or value > (MAX_SECONDS if name in _SPANS else 1_000_000):
                found.append(f"{name} = {value:g} is out of range")
        if not 0 <= self.shadow <= 1:
            found.append(f"shadow = {self.shadow:g} is no share")
        if not 0 < self.shadow_memory_mib <= 1_000_000:
            found.append(f"shadow_memory_mib = {self.shadow_memory_mib} is out of range")
        if self.max_soak and self.max_soak < self.soak:
            found.append(f"max_soak ({self.max_soak:g} s) is shorter than soak ({self.soak:g} s)")
        if self.deadline < self.progress_timeout:
            found.append(
                f"deadline ({self.deadline:g} s) is shorter than progress_timeout ({self.progress_timeout:g} s)"
            )
        if repeated := {name for name in self.devices if self.devices.count(name) > 1}:
            found.append(f"devices names {', '.join(sorted(repeated))} twice")
        return found

    def _wave_problems(self) -> list[str]:
        try:
            sizes = self.sizes
        except ConfigError as error:
            return [error.what]
        if not sizes or len(sizes) > MAX_WAVES:
            return [f"there must be 1 to {MAX_WAVES} waves"]
        found = []
        if sizes[-1].share != 1:
            found.append(f"the last wave reaches {sizes[-1]}, it must reach 100%: choose fewer devices by `select`")
        for before, size in itertools.pairwise(sizes):
            comparable = (before.share is None) == (size.share is None)
            if comparable and (size.share or 0, size.count) <= (before.share or 0, before.count):
                found.append(f"the waves must grow, and {size} follows {before}")
        return found


def read(path: Path, **changed: Any) -> Policy:
    """Read a policy from TOML.

    Args:
        changed: fields that are set over the file's, as they are written in TOML; keys of tables one by one.

    Raises:
        ConfigError: the file cannot be read, or the policy does not fit.
    """
    try:
        document = toml.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", where=str(path)) from error
    except (toml.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"is no TOML: {error}", where=str(path)) from error
    tables = {
        name: {**document[name], **value}
        for name, value in changed.items()
        if isinstance(value, dict) and isinstance(document.get(name), dict)
    }
    return parse({**document, **changed, **tables}, where=str(path))


def parse(document: Mapping[str, Any], *, where: str = "policy") -> Policy:
    """Make a policy of plain data, as TOML holds it.

    Raises:
        ConfigError: it does not fit.
    """
    plain = dict(document)
    try:
        for name in _SPANS:
            if isinstance(plain.get(name), str):
                plain[name] = _span(name, plain[name])
        plain["not_before"] = _moment(plain.get("not_before", 0.0))
        if isinstance(plain.get("waves"), (list, tuple)):
            plain["waves"] = [str(one) if isinstance(one, int) else one for one in plain["waves"]]
        return codec.structure(plain, Policy, where=where, strict=True).check()
    except ConfigError as error:
        raise ConfigError(error.what, where=error.where or where, remedy=error.remedy) from error


def _span(name: str, text: str) -> float:
    try:
        return times.parse_span(text)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error.what}", remedy=error.remedy) from error


def _moment(value: Any) -> Any:
    if isinstance(value, datetime.datetime):
        return times.parse_moment(value.isoformat())
    return times.parse_moment(value) if isinstance(value, str) else value


def dump(policy: Policy) -> str:
    """Return a policy as JSON, for the database."""
    return codec.encode(policy).decode()


def load(text: str) -> Policy:
    """Read what :func:`dump` made."""
    return codec.decode(text.encode(), Policy, where="stored policy")
