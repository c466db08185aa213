"""The fleet's figures for Prometheus. Their number grows with targets, releases and running rollouts, not with
devices."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from kedge.fleet import health
from kedge.fleet.service import FleetService
from kedge_protocol.errors import KedgeError

ROLLOUTS = 20
"""The latest rollouts, of which those that are active are told."""


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
        for rollout in self._fleet.rollouts(limit=ROLLOUTS):
            if rollout.state == "active":
                for progress, count in rollout.counts.items():
                    found.add_metric([str(rollout.id), rollout.model, rollout.version, progress], count)
        yield found


def registry(fleet: FleetService) -> CollectorRegistry:
    """Return the registry of one controller: the fleet's figures and those of its process."""
    found = CollectorRegistry()
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    GCCollector(registry=found)
    found.register(FleetCollector(fleet))
    return found
