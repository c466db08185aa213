"""Which versions of a model a client loads or unloads: the protocol's extension for model repositories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kedge_agent.serving import json_tensors
from kedge_protocol.errors import InputError

if TYPE_CHECKING:
    from kedge_agent.serving.model_pool import Entry

LOADED_AS_COMPILED = (
    "a bundle is loaded as it was compiled; of 'parameters' a load takes 'config' with 'version_policy' alone"
)


class NoModelError(Exception):
    """A path that names no model that can answer.

    Args:
        status: 404 or 503.
        text: the reason.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


@dataclass(frozen=True)
class Versions:
    """A choice of versions.

    Attributes:
        named: these; empty for ``newest``.
        newest: so many of the newest.
        only: whether the others are unloaded by a load.
    """

    named: tuple[str, ...] = ()
    newest: int = 0
    only: bool = False

    def of(self, entries: Sequence[Entry]) -> list[Entry]:
        """Return the chosen ones of a model's versions, the newest last; none if one that is named is not there."""
        if self.newest:
            return list(entries[-self.newest :])
        found = [entry for entry in entries if entry.version in self.named]
        return found if {entry.version for entry in found} == set(self.named) else []


def specific(version: str) -> Versions:
    """Return the choice of one version, which leaves the others as they are."""
    return Versions(named=(version,))


def asked(body: bytes) -> Versions | None:
    """Return the choice in the body of a load.

    Raises:
        NoModelError: the load would change the model: bundles are made by ``kedge compile`` alone.
    """
    try:
        parameters = json_tensors.parse(body, ()).get("parameters", {})
    except InputError as error:
        raise NoModelError(400, str(error)) from error
    if not isinstance(parameters, dict):
        raise NoModelError(400, LOADED_AS_COMPILED)
    return chosen(parameters)


def chosen(parameters: Mapping[str, Any]) -> Versions | None:
    """Return the choice in the parameters of a load: Triton's ``version_policy`` in ``config``, a text of JSON.

    Raises:
        NoModelError: as in :func:`asked`.
    """
    if not parameters:
        return None
    config = parameters.get("config")
    if set(parameters) != {"config"} or not isinstance(config, str):
        raise NoModelError(400, LOADED_AS_COMPILED)
    try:
        policy = json_tensors.parse(config.encode(), ())
    except InputError as error:
        raise NoModelError(400, f"config: {error}") from error
    if set(policy) != {"version_policy"}:
        raise NoModelError(400, LOADED_AS_COMPILED)
    match policy["version_policy"]:
        case {"all": _}:
            return None
        case {"latest": {"num_versions": int(count)}} if count > 0:
            return Versions(newest=count, only=True)
        case {"specific": {"versions": [_, *_] as named}} if all(isinstance(one, (str, int)) for one in named):
            return Versions(named=tuple(map(str, named)), only=True)
    raise NoModelError(400, "version_policy is none of: all, latest with num_versions, specific with versions")
