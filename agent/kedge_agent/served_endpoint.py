"""The served endpoint: the way by which users reach a model on this device, through which golden samples are sent.

That is HTTP to the serving process, at the address, with the token and the encryption that users have. Where there is
no HTTP, or clients must present a certificate, which the agent has none of, it is :class:`kedge_agent.model.Model` in a
process of its own, as applications load it. The worker's side is :mod:`kedge_agent.endpoint_client`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kedge_agent.slots import ModelFolder

if TYPE_CHECKING:
    from kedge_agent.config import AgentConfig

ASK = "kedge_agent.endpoint_client:ask"


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where users reach this device's models.

    Attributes:
        address: ``host:port`` of the serving process; None for applications that load the model themselves.
        token_file: file with the token of its clients.
        certificate: its own certificate, if it speaks TLS.
        call_seconds: deadline of one call.
        deadline: deadline of all calls together.
    """

    address: str | None = None
    token_file: str | None = None
    certificate: str | None = None
    call_seconds: float = 30.0
    deadline: float = 120.0


@dataclass(frozen=True, kw_only=True)
class EndpointRequest:
    """A request to :func:`kedge_agent.endpoint_client.ask`."""

    state: str
    model: str
    digest: str
    endpoint: Endpoint


@dataclass(frozen=True, kw_only=True)
class EndpointAnswer:
    """``samples``: the number of golden samples that were answered and held."""

    samples: int


def endpoint_of(config: AgentConfig) -> Endpoint:
    """Return the endpoint of a configured agent."""
    server = config.server
    return Endpoint(
        address=config.listen if server.tls_client_ca is None else None,
        token_file=server.token_file,
        certificate=server.tls_cert,
        call_seconds=server.call_seconds,
        deadline=config.proof.deadline,
    )


def knock(folder: ModelFolder, digest: str, *, endpoint: Endpoint | None = None) -> int:
    """Send the golden samples of a model's current bundle through its endpoint, from the worker: the resident agent
    loads neither numpy nor a runtime.

    Args:
        digest: of the bundle that must answer.

    Returns:
        The number of samples that were answered within the tolerance.

    Raises:
        VerificationError: an answer lies outside it.
        KedgeError: the endpoint does not answer, or another bundle does.
    """
    from kedge_targets.worker import Worker

    endpoint = endpoint or Endpoint()
    request = EndpointRequest(state=str(folder.state), model=folder.name, digest=digest, endpoint=endpoint)
    with Worker(name=f"endpoint-{folder.name}") as worker:
        return worker.call(ASK, request, EndpointAnswer, deadline=endpoint.deadline).samples
