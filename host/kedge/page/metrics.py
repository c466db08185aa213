"""The fleet's figures for Prometheus. Their number grows with targets, releases and running rollouts, not with
devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kedge.fleet import health
from kedge.fleet.results import RolloutSummary, StageView
from kedge.fleet.service import FleetService
from kedge.fleet.staged.gates import Verdict
from kedge.fleet.staged.phases import ENDED
from kedge_protocol.errors import KedgeError

ROLLOUTS = 20
"""The latest rollouts, of which those that are active are told."""
GATES_SECONDS = 3600.0
"""Gates are told for so long after a rollout's end, so that an alert sees why it ended."""
VERDICTS = {Verdict.PASS: 1, Verdict.UNDECIDED: 0, Verdict.FAIL: -1}


class FleetCollector(Collector):
    """Reads the fleet when Prometheus asks.

    Args:
        fleet: whose figures.
    """

    def __init__(self, fleet: FleetService) -> None:
        self._fleet = fleet

    def describe(self) -> Iterator[Metric]:
        """Registering reads nothing."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """Read all figures."""
        yield self._connected()
        overview = self._fleet.overview()
        by_health = GaugeMetricFamily("kedge_devices", "Devices by target and health.", labels=["target", "health"])
        online = GaugeMetricFamily("kedge_devices_online", "Devices that are there, by target.", labels=["target"])
        for target in overview.targets:
            online.add_metric([target.target], target.online)
            for name, count in target.health.items():
                by_health.add_metric([target.target, name], count)
        yield by_health
        yield online
        serving = GaugeMetricFamily(
            "kedge_devices_serving", "Devices by the release that they serve.", labels=["model", "version", "target"]
        )
        for release in overview.releases:
            serving.add_metric([release.model, release.version, release.target], release.devices)
        yield serving
        yield from self._rollouts()

    def _connected(self) -> Metric:
        try:
            health.check(self._fleet.state)
        except KedgeError:
            connected = 0
        else:
            connected = 1
        return GaugeMetricFamily(
            "kedge_controller_connected", "Whether the controller is connected to its broker.", value=connected
        )

    def _rollouts(self) -> Iterator[Metric]:
        found = GaugeMetricFamily(
            "kedge_rollout_devices",
            "Devices of active rollouts by their progress.",
            labels=["rollout", "model", "version", "progress"],
        )
        latest = self._fleet.rollouts(limit=ROLLOUTS)
        for rollout in latest:
            if rollout.state == "active":
                for progress, count in rollout.counts.items():
                    found.add_metric([str(rollout.id), rollout.model, rollout.version, progress], count)
        yield found
        yield from self._stages([(one, one.stage) for one in latest if one.stage is not None])

    def _stages(self, staged: Sequence[tuple[RolloutSummary, StageView]]) -> Iterator[Metric]:
        of_rollout = ["rollout", "model", "version"]
        of_gate = [*of_rollout, "gate", "target"]
        waves = GaugeMetricFamily("kedge_rollout_wave", "Wave that a rollout has reached.", labels=of_rollout)
        phases = GaugeMetricFamily("kedge_rollout_phase", "Phase of a rollout.", labels=[*of_rollout, "phase"])
        verdicts = GaugeMetricFamily(
            "kedge_rollout_gate", "What a gate says: 1 pass, 0 undecided, -1 fail.", labels=of_gate
        )
        figures = GaugeMetricFamily("kedge_rollout_gate_figure", "What a gate judges.", labels=of_gate)
        limits = GaugeMetricFamily("kedge_rollout_gate_limit", "The limit of a gate's figure.", labels=of_gate)
        since = self._fleet.database.clock() - GATES_SECONDS
        for rollout, stage in staged:
            if stage.phase in ENDED and stage.since < since:
                continue
            labels = [str(rollout.id), rollout.model, rollout.version]
            waves.add_metric(labels, stage.wave)
            phases.add_metric([*labels, stage.phase.value], 1)
            for gate in stage.gates:
                place = [*labels, gate.gate, gate.target]
                verdicts.add_metric(place, VERDICTS[gate.verdict])
                limits.add_metric(place, gate.limit)
                if gate.figure is not None:
                    figures.add_metric(place, gate.figure)
        yield from (waves, phases, verdicts, figures, limits)


def registry(fleet: FleetService) -> CollectorRegistry:
    """Return the registry of one controller: the fleet's figures and those of its process."""
    found = CollectorRegistry()
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    GCCollector(registry=found)
    found.register(FleetCollector(fleet))
    return found
