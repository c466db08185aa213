"""Makes the two releases of a scenario: real bundles with real digests, whose files hold random bytes."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from dataclasses import replace
from pathlib import Path

from kedge.simulator.scenario import MODEL, Release, Scenario
from kedge_protocol import digest
from kedge_protocol.blocks import BLOCK_SIZE
from kedge_protocol.bundle import config as cfg
from kedge_protocol.bundle.write import new_layout

BACKEND = "simulated"
"""Of a release with one bundle of each target."""
RUNTIME = "simulated-runtime"
"""The distribution that the bundles need, and that simulated devices have."""
_ENTRY, _GOLDEN = "model.bin", "golden.npz"
_GOLDEN_BYTES = 2000


def write(scenario: Scenario, out: Path) -> tuple[Path, Path]:
    """Write the layouts of the old and the new release.

    Args:
        out: an existing folder.

    Returns:
        Their folders, for ``kedge publish``.
    """
    folders = []
    for release in (scenario.old, scenario.new):
        folder = out / release.version
        with tempfile.TemporaryDirectory(dir=out) as scratch, new_layout(folder) as writer:
            for target, backend in itertools.product(scenario.targets, release.backends or (BACKEND,)):
                source = Path(scratch) / f"{target} {backend}"
                source.mkdir()
                entry, golden = source / _ENTRY, source / _GOLDEN
                entry.write_bytes(_bytes_of(scenario, release, target, backend))
                golden.write_bytes(random.Random(f"{scenario.seed} {release.version} golden").randbytes(_GOLDEN_BYTES))
                config = replace(_config(release, target, digest.of_file(golden)), backend=backend)
                writer.add_bundle(config, {_ENTRY: entry}, golden)
            writer.add_release(MODEL, release.version)
        folders.append(folder)
    return folders[0], folders[1]


def _bytes_of(scenario: Scenario, release: Release, target: str, backend: str) -> bytes:
    """Return a release's file; of the new one, ``changed`` says how many blocks are not the old one's."""
    whose = target if backend == BACKEND else f"{target} {backend}"
    own = random.Random(f"{scenario.seed} {release.version} {whose}").randbytes(release.size)
    if release is scenario.old or release.changed >= 1:
        return own
    before = _bytes_of(scenario, scenario.old, target, next(iter(scenario.old.backends), BACKEND))
    places = range(0, release.size, BLOCK_SIZE)
    chance = random.Random(f"{scenario.seed} {target} changed")
    fresh = set(chance.sample(places, math.ceil(release.changed * len(places))))
    return b"".join(
        (own if at in fresh or len(before) < min(at + BLOCK_SIZE, release.size) else before)[
            at : min(at + BLOCK_SIZE, release.size)
        ]
        for at in places
    )


def _config(release: Release, target: str, golden: str) -> cfg.BundleConfig:
    file = cfg.FileTensor(name="x", index=0, shape=(1, 4), dtype="float32")
    spec = cfg.TensorSpec(name="x", shape=(None, 4), dtype="float32", file=file)
    return cfg.BundleConfig(
        schema_version=cfg.SCHEMA_VERSION,
        name=MODEL,
        version=release.version,
        target=target,
        backend=BACKEND,
        entry=_ENTRY,
        precision="int8",
        runtimes=(cfg.RuntimeRequirement(distribution=RUNTIME, minimum="1"),),
        inputs=(spec,),
        outputs=(spec,),
        metric=cfg.Metric(name="top1", value=1.0, reference=1.0, samples=8, measured_on="a simulation"),
        resources=cfg.Resources(storage_bytes=release.size, memory_bytes=2 * release.size),
        provenance=cfg.Provenance(
            model_digest=golden, evaluation_digest=golden, calibration_samples=0, evaluation_samples=8, tools={}
        ),
        verified=cfg.Verified.SIMULATED,
        golden=cfg.GoldenRef(file=_GOLDEN, digest=golden, samples=8, kernel_sets=("one",)),
    )
