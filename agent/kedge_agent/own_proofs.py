"""Proofs on a machine without an agent: each bundle is proved once, what was found is kept, and of several bundles for
one target the better one is taken, by the fleet's rule.

::

    CACHE/proofs/HEX.json     of the bundle with this digest
    CACHE/calls/HEX.json      how its calls are run here, see :mod:`kedge_targets.calls.plan`
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.proving import Proof, ProofLimits, others_of, prove
from kedge_agent.runtimes import installed_runtimes
from kedge_agent.update.compatibility import require_distribution
from kedge_protocol import candidates, codec, digest, files
from kedge_protocol.bundle.layout import Bundle
from kedge_protocol.candidates import Candidate
from kedge_protocol.errors import KedgeError, VerificationError
from kedge_targets.calls import plan as plans

log = logging.getLogger(__name__)

_FOLDER = "proofs"
_KEPT = 64


@dataclass(frozen=True, kw_only=True)
class KeptProof:
    """A proof that passed, and for what it holds.

    Attributes:
        cores: that the process had.
        runtimes: installed distribution → version, of those that can run the bundle.
        others: model → digest of the bundles that took part in it.
        proof: what was found.
    """

    cores: int
    runtimes: dict[str, str]
    others: dict[str, str] = field(default_factory=dict)
    proof: Proof


class OwnProofs:
    """The proofs of one user on this machine.

    Args:
        cache: folder for what is built and measured here.
        on_progress: called with a line for what takes a while.
        limits: of the worker.
    """

    def __init__(
        self,
        cache: Path,
        on_progress: Callable[[str], None] = lambda line: None,
        limits: ProofLimits = ProofLimits(),  # noqa: B008 -- frozen
    ) -> None:
        self._cache = cache
        self._on_progress = on_progress
        self._limits = limits

    def best(self, bundles: Sequence[Bundle], folders: Sequence[Path]) -> int:
        """Return the index of the better one of the bundles for one target; one that is alone is proved as well.

        Args:
            bundles: in the compiler's order.
            folders: their slots.

        Raises:
            VerificationError: none passes its proof here. Of a bundle that is alone, the reason itself is raised.
        """
        found: list[Candidate] = []
        reasons: list[tuple[str, KedgeError]] = []
        for bundle, folder in zip(bundles, folders, strict=True):
            proof = None
            try:
                proof = self.proof(bundle, folder)
            except KedgeError as error:
                reasons.append((bundle.config.backend, error))
                log.info("%s by %s: %s", bundle.config.name, bundle.config.backend, error)
            found.append(_candidate(bundle, proof))
        chosen = candidates.choose(found)
        if chosen is not None:
            if len(bundles) > 1:
                self._on_progress(_words(bundles, found, chosen))
            return chosen
        if len(reasons) == 1:
            raise reasons[0][1]
        raise VerificationError(
            f"none of the {len(bundles)} bundles for {bundles[0].config.target} runs here: "
            + "; ".join(f"by {backend}: {error}" for backend, error in reasons),
            where=bundles[0].config.name,
        )

    def proof(self, bundle: Bundle, folder: Path) -> Proof:
        """Return a bundle's proof: the kept one, or a new one, which takes seconds and is kept.

        Raises:
            KedgeError: it does not pass.
        """
        config = bundle.config
        runtimes = installed_runtimes(tuple(need.distribution for need in config.runtimes))
        require_distribution(config, runtimes)
        others = {name: one.digest for name, one in others_of(folder, config).items()}
        kept = self._read(bundle.digest)
        if kept is not None and (kept.cores, kept.runtimes, kept.others) == (plans.cores(), runtimes, others):
            return kept.proof
        self._on_progress(f"{config.name} {config.version} is proved and measured here, by {config.backend}")
        proof = prove(folder, config, self._limits, self._cache, log.info)
        self._keep(bundle.digest, KeptProof(cores=plans.cores(), runtimes=runtimes, others=others, proof=proof))
        return proof

    def _read(self, bundle: str) -> KeptProof | None:
        path = self._path(bundle)
        try:
            return codec.decode(path.read_bytes(), KeptProof, where=str(path))
        except (OSError, KedgeError):
            return None

    def _keep(self, bundle: str, proof: KeptProof) -> None:
        path = self._path(bundle)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write(path, codec.encode(proof))
        except OSError as error:
            log.warning("%s cannot be written, so the proof is made again: %s", path, error.strerror)
            return
        for old in sorted(path.parent.glob("*.json"), key=lambda one: one.stat().st_mtime)[:-_KEPT]:
            with contextlib.suppress(OSError):
                old.unlink()

    def _path(self, bundle: str) -> Path:
        return self._cache / _FOLDER / f"{digest.hex_of(bundle)}.json"


def _candidate(bundle: Bundle, proof: Proof | None) -> Candidate:
    return Candidate(
        size=bundle.transfer_bytes,
        p50_ms=None if proof is None else proof.p50_ms,
        p95_ms=None if proof is None else proof.p95_ms,
        failed=proof is None,
        max_ms=candidates.allowed_ms(bundle.config),
    )


def _words(bundles: Sequence[Bundle], found: Sequence[Candidate], chosen: int) -> str:
    """Describe a choice."""
    told = (
        f"{bundle.config.backend} {'does not run here' if one.failed else _milliseconds(one)}"
        for bundle, one in zip(bundles, found, strict=True)
    )
    return f"{bundles[chosen].config.name}: {bundles[chosen].config.backend} is taken ({', '.join(told)})"


def _milliseconds(one: Candidate) -> str:
    return "was not timed" if one.p50_ms is None else f"{one.p50_ms:.3g} ms"
