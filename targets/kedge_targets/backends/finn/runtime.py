"""Runs models on the device: on the accelerator if there is a bitfile and a board, else in the bit-exact simulator,
with a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import ConfigError, MissingDependencyError, VerificationError
from kedge_targets import contract
from kedge_targets.backends.finn import board, graph_file, throughput_cache
from kedge_targets.backends.finn.simulator import Simulator

if TYPE_CHECKING:
    from kedge_targets.worker.progress import Progress

Array = npt.NDArray[Any]

SIMULATOR = "simulator"
FIGURES = "figures"
"""Option that :meth:`Runtime.prepare` gives to :meth:`Runtime.load`."""

_KNOWN_OPTIONS = frozenset({"board", "settings", "bitfile"})

log = logging.getLogger(__name__)


class Runtime(contract.Runtime):
    """Runs models with FINN's driver and a bitfile, or in numpy without one.

    Options:
        board: FINN's name of the board (``Pynq-Z2``), for messages.
        bitfile: title of the ``.bit`` file in the bundle.
        settings: title of the driver's ``settings.json``.
    """

    distributions = (board.DISTRIBUTION, "numpy")
    exact = True

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``simulator``: the streamlined integer graph in numpy. It is the only one, since the
        fabric computes the same integers, and nothing may deviate from it."""
        return (SIMULATOR,)

    def prepare(self, folder: Path, config: BundleConfig, *, cache: Path, progress: Progress) -> Mapping[str, Any]:
        """Run FINN's throughput test once for each bitfile, and keep the results."""
        options = _checked(config.runtime_options)
        if "bitfile" not in options:
            return {}
        kept = throughput_cache.Kept(cache, folder / options["bitfile"])
        figures = kept.read()
        if figures is None:
            progress("throughput test", 0, 1)
            try:
                parts = _Parts(graph_file.read(folder / config.entry))
                accelerator = parts.accelerator(folder, options)
            except MissingDependencyError:
                return {}
            try:
                figures = accelerator.throughput()
            finally:
                accelerator.close()
            kept.write(figures)
            progress("throughput test", 1, 1)
        return {FIGURES: figures}

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> contract.Session:
        """See :meth:`kedge_targets.contract.Runtime.load`. With a kernel set, the simulator always runs."""
        if kernel_set not in (None, SIMULATOR):
            raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known is {SIMULATOR}")
        checked = _checked(options)
        graph = graph_file.read(entry)
        if kernel_set is not None:
            return Simulated(Simulator(graph), "")
        wanted = checked.get("board", "the board")
        if "bitfile" not in checked:
            return Simulated(
                Simulator(graph), f"simulated bit for bit in numpy: the bundle has no bitfile for {wanted}"
            )
        parts = _Parts(graph)
        try:
            accelerator = parts.accelerator(entry.parent, checked)
        except MissingDependencyError as error:
            log.warning("%s is simulated and does not run on %s: %s", entry.name, wanted, error)
            return Simulated(Simulator(graph), f"simulated bit for bit in numpy instead of {wanted}: {error.what}")
        return OnBoard(parts, accelerator, _described(accelerator, wanted, checked.get(FIGURES)), checked.get(FIGURES))


class Simulated(contract.Session):
    """The whole graph in numpy."""

    concurrent = True

    def __init__(self, simulator: Simulator, detail: str) -> None:
        self._simulator = simulator
        self.detail = detail

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`."""
        return self._simulator.run(inputs)


class OnBoard(contract.Session):
    """The accelerator, with the parts before and after it in numpy."""

    def __init__(
        self, parts: _Parts, accelerator: board.Accelerator, detail: str, figures: Mapping[str, float] | None
    ) -> None:
        self._before, self._behind = parts.before, parts.behind
        self._accelerator = accelerator
        self.detail = detail
        self.figures = dict(figures or {})

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`."""
        given = self._before.run(inputs)[0]
        size = self._accelerator.batch
        parts = [self._accelerator.run(given[start : start + size]) for start in range(0, len(given), size)]
        answers = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return self._behind.run([answers])

    def close(self) -> None:
        """Free the accelerator's buffers."""
        self._accelerator.close()


class _Parts:
    """A graph split at the accelerator.

    Raises:
        VerificationError: no part of it, or more than one, is the accelerator, or not exactly one tensor goes in and
            out.
    """

    def __init__(self, graph: graph_file.Graph) -> None:
        inside = [node for node in graph.nodes if node.fabric]
        first = next((index for index, node in enumerate(graph.nodes) if node.fabric), 0)
        outside = graph.nodes[:first], graph.nodes[first + len(inside) :]
        if not inside or any(node.fabric for node in (*outside[0], *outside[1])):
            raise VerificationError(
                "no part of it, or more than one, is the accelerator",
                where=graph_file.GRAPH,
                remedy="Compile the model again",
            )
        made_before = {name for node in outside[0] for name in node.outputs} | set(graph.inputs)
        made_inside = {name for node in inside for name in node.outputs}
        given = _read(inside) & made_before
        answers = (_read(outside[1]) | set(graph.outputs)) & made_inside
        if len(given) != 1 or len(answers) != 1 or (_read(outside[1]) | set(graph.outputs)) & made_before:
            raise VerificationError(
                f"{len(given)} tensors go into the accelerator, {len(answers)} come out, or one goes past it",
                where=graph_file.GRAPH,
            )
        self._given, self._answer = given.pop(), answers.pop()
        self._graph = graph
        self.before = Simulator(replace(graph, outputs=(self._given,), nodes=outside[0]))
        self.behind = Simulator(replace(graph, inputs=(self._answer,), nodes=outside[1]))

    def accelerator(self, folder: Path, options: Mapping[str, Any]) -> board.Accelerator:
        """Return the accelerator for a bundle's files; see :class:`board.Accelerator`."""
        given, answer = (self._graph.tensors[name].shape[1:] for name in (self._given, self._answer))
        return board.Accelerator(folder / options["bitfile"], folder / options["settings"], (given, answer))


def _read(nodes: Sequence[graph_file.Node]) -> set[str]:
    return {name for node in nodes for name in node.inputs}


def _described(accelerator: board.Accelerator, wanted: str, figures: Mapping[str, float] | None) -> str:
    speed = f", {figures['samples_per_second']:.0f} samples a second by FINN's throughput test" if figures else ""
    return f"FINN accelerator on {wanted} at {accelerator.clock_mhz:g} MHz{speed}"


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS - {FIGURES}):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    for name in _KNOWN_OPTIONS & set(options):
        value = options[name]
        if not isinstance(value, str) or not value or (name != "board" and Path(value).name != value):
            raise ConfigError(f"{name} = {value!r} is no name of a file in the bundle")
    if "bitfile" in options and "settings" not in options:
        raise ConfigError("a bitfile needs settings", remedy="Compile the model again")
    return dict(options)
