"""The JSON routes against their own OpenAPI document, by schemathesis."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.schemas import OpenApiSchema
from tests.support.pages import releases

from kedge.fleet.service import FleetService
from kedge.fleet.staged.policy import Policy
from kedge.page.options import PageOptions
from kedge.page.server import serving

__all__ = ["releases"]

SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory, releases: dict[str, Path]) -> Iterator[OpenApiSchema]:
    """The document of a page whose fleet has devices, releases and a rollout to be found."""
    address = PageOptions(page="127.0.0.1:0").parsed()
    assert address is not None
    with FleetService(tmp_path_factory.mktemp("fuzzed")) as fleet:
        for layout in releases.values():
            fleet.publish(layout)
        fleet.device_add("pi", "rpi4")
        fleet.rollout_start("tiny:1.0")
        fleet.rollout_start("tiny:2.0", policy=Policy(soak=3600.0))
        with serving(fleet.state, address) as url:
            yield schemathesis.openapi.from_url(f"{url}api/v1/openapi.json")


def try_all(routes: OpenApiSchema, examples: int) -> None:
    """Ask every route with what its document allows, and with what it does not."""
    tried = 0
    for mode, found in itertools.product(GenerationMode, routes.get_all_operations()):
        operation = found.ok()

        @settings(SETTINGS, max_examples=examples)
        @given(case=operation.as_strategy(generation_mode=mode))
        def answers_are_as_the_document_says(case: schemathesis.Case) -> None:
            case.call_and_validate()

        # A route without parameters cannot be asked wrongly.
        with contextlib.suppress(Unsatisfiable):
            answers_are_as_the_document_says()
            tried += 1
    assert tried > 25


def test_every_answer_is_as_the_document_says(routes: OpenApiSchema) -> None:
    try_all(routes, 6)


@pytest.mark.campaign
def test_every_answer_is_as_the_document_says_for_long(routes: OpenApiSchema) -> None:
    try_all(routes, 40)
