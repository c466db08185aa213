"""The first part of a split model: it writes text through the devices with the other parts."""

from __future__ import annotations

from pathlib import Path

from kedge_agent.generation.engine import Engine
from kedge_agent.generation.engines import Engines
from kedge_agent.split.link import Hello, RemoteStage
from kedge_agent.split.settings import SplitSettings
from kedge_protocol import golden
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.bundle.generation import Generation, Part
from kedge_protocol.golden import Golden
from kedge_targets import registry
from kedge_targets.decoder import golden as vectors
from kedge_targets.decoder.stages import Stage, StagedDecoder


class SplitDecoder(StagedDecoder):
    """A decoder whose later layers are on other devices. Whenever the others are reached anew, a golden vector of all
    parts together is run before anything else.

    Args:
        whole: the golden vectors.
    """

    def __init__(self, stages: tuple[Stage, ...], whole: Golden, *, slots: int, context: int) -> None:
        super().__init__(stages, slots=slots, context=context)
        self._whole = whole
        self._proved = False

    def ready(self) -> bool:
        """See :meth:`kedge_targets.decoder.session.DecoderSession.ready`.

        Raises:
            NeighbourError: another device cannot be reached.
            VerificationError: the parts together do not give the golden vectors.
        """
        if super().ready() and self._proved:
            return True
        self._proved = False
        tokens, columns, _ = vectors.inputs(self._whole, where="all parts together")
        found = vectors.answers(self, tokens[:1], columns[:1])
        expected = {name: value[:1] for name, value in self._whole.outputs.items()}
        one = Golden(self._whole.inputs, expected, self._whole.tolerances)
        golden.require(golden.compare(one, found), where="all parts together")
        self._proved = True
        return False


def engines(folder: Path, config: BundleConfig, spec: Generation, part: Part, settings: SplitSettings) -> Engines:
    """Return the engines of a split model: one for each device with a part, as far as there are slots for, so that all
    devices compute at once, each for the sequences of another engine.

    Raises:
        ConfigError: no device with the other layers is named.
        BundleError, VerificationError, InputError: see :class:`kedge_agent.generation.generator.TextGenerator`.
    """
    address = settings.after(config.name)
    make = registry.runtime(config.backend).load_stage(folder / config.entry, config.runtime_options)
    whole = golden.load(folder / (part.whole or ""))
    groups = min(part.count, spec.slots)
    found = []
    for group in range(groups):
        slots = len(range(group, spec.slots, groups))
        wanted = Hello(bundle=part.following or "", slots=slots)
        beyond = RemoteStage(settings, address, wanted, channels=part.channels)
        stages = (make(slots, spec.context), beyond)
        found.append(Engine(SplitDecoder(stages, whole, slots=slots, context=spec.context)))
    return Engines(found)
