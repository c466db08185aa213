"""What every benchmark gives: a ratio against a named baseline, measured in the same run."""

from __future__ import annotations

import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / ".venv" / "bin"
SHARED = ROOT.parent / "shared" / "data"


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        span: what was measured, from where to where.
        kedge, baseline: medians in ``unit``; ``baseline`` is None for a bound that is not a ratio.
        goal: in words; ``met`` whether it holds.
    """

    name: str
    span: str
    unit: str
    kedge: float
    baseline: float | None
    against: str
    goal: str
    met: bool

    @property
    def ratio(self) -> float | None:
        """Kedge over baseline."""
        return None if self.baseline is None else self.kedge / self.baseline


def medians(repeats: int, *measured: Callable[[], float]) -> list[float]:
    """Run each in turn, ``repeats`` times round, so that all see the same machine; the median of each."""
    return [statistics.median(column) for column in turns(repeats, *measured)]


def turns(repeats: int, *measured: Callable[[], float]) -> list[list[float]]:
    """Run each in turn, ``repeats`` times round, so that all see the same machine; all that was measured of each."""
    taken: list[list[float]] = [[] for _ in measured]
    for _ in range(repeats):
        for column, measure in zip(taken, measured, strict=True):
            column.append(measure())
    return taken


def undisturbed(column: Sequence[float]) -> float:
    """The tenth of the measurements that was quickest, at its end: what a core gives that no neighbour uses. Virtual
    machines share the units of a core, and programs of integers lose more by it than those of floats."""
    return statistics.quantiles(column, n=10)[0]


def output_of(argv: Sequence[str | Path], *, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run([str(part) for part in argv], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, argv))}\n{done.stderr}")
    return done.stdout


def table(results: Sequence[Result]) -> str:
    """Markdown, for the terminal and for docs/benchmarks.md."""
    lines = ["| what | span | Kedge | baseline | ratio | goal | met |", "|---|---|---|---|---|---|---|"]
    for result in results:
        baseline = "" if result.baseline is None else f"{result.baseline:.4g} {result.unit} ({result.against})"
        ratio = "" if result.ratio is None else f"{result.ratio:.{2 if result.ratio >= 0.1 else 5}f}"
        lines.append(
            f"| {result.name} | {result.span} | {result.kedge:.4g} {result.unit} | {baseline} | {ratio} "
            f"| {result.goal} | {'yes' if result.met else 'NO'} |"
        )
    return "\n".join(lines)


def save(results: Sequence[Result], path: Path) -> None:
    """The same as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(result) | {"ratio": result.ratio} for result in results], indent=1))


def living_seconds() -> float:
    """Processor seconds of this process and of the children that live, the toolchain's among them."""
    psutil = importlib.import_module("psutil")
    here = psutil.Process()
    times = [one.cpu_times() for one in (here, *here.children(recursive=True))]
    return float(sum(one.user + one.system for one in times))


def ended_seconds() -> float:
    """Processor seconds of the children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def bare_environment() -> dict[str, str]:
    """Of a process in a toolchain's environment that sees nothing of Kedge."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("PYTHONPATH", None)
    return environment
