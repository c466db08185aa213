"""What a dry run says will move is what a device then pulls: the host reckons as the agent does."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.staged_fleet import StagedFleet
from tests.support.update_world import TARGET, Release, World, block_map, make_release, serving

from kedge.fleet.staged.policy import Policy
from kedge_protocol import digest
from kedge_protocol.blocks import BLOCK_SIZE, block_length
from kedge_protocol.bundle.layout import Layout, parse_bundle
from kedge_protocol.bundle.write import new_layout
from kedge_protocol.messages import BlobKind

MODEL = "tiny"
NUMBERS = st.lists(st.integers(0, 3), min_size=1, max_size=5)
FILES = st.lists(st.tuples(NUMBERS, st.sampled_from([0, 1, 700, BLOCK_SIZE - 1])), min_size=1, max_size=2)
"""Of each file its blocks, of which 0 is all zeros, and by how much the last one is shorter."""
Files = list[tuple[list[int], int]]


def published(folder: Path, version: str, files: Files) -> tuple[Path, Release]:
    """The layout of a bundle with these files, and what a device's controller has of it."""
    contents = [b"".join(bytes([number]) * BLOCK_SIZE for number in numbers) for numbers, _ in files]
    named = {f"{place}.bin": content[: len(content) - files[place][1]] for place, content in enumerate(contents)}
    made = make_release(named, name=MODEL, version=version)
    document = next(blob for blob in made.blobs.values() if b"schema_version" in blob)
    source = folder / f"files of {version}"
    source.mkdir()
    for title, content in made.files.items():
        (source / title).write_bytes(content)
    with new_layout(folder / version) as writer:
        config = parse_bundle(made.blobs[made.digest], document, where="test").config
        writer.add_bundle(config, {title: source / title for title in named}, source / "golden.npz")
        writer.add_release(MODEL, version)
    bundle = Layout(folder / version).bundle(TARGET)
    parts = [bundle.manifest.config.digest, *(layer.digest for layer in bundle.manifest.layers)]
    blobs = {one: (folder / version / "blobs" / "sha256" / digest.hex_of(one)).read_bytes() for one in parts}
    return folder / version, Release(bundle.digest, len(bundle.raw), blobs | {bundle.digest: bundle.raw}, made.files)


def pulled(world: World) -> int:
    """The payload bytes that the device was served."""
    total = 0
    for (name, kind, index), times in world.controller.served.items():
        blob = world.controller.blobs[name]
        total += times * block_length(len(block_map(blob) if kind is BlobKind.MAP else blob), index)
    return total


@settings(max_examples=15, deadline=None)
@given(old=FILES, new=FILES)
@example(old=[([1, 2], 0)], new=[([1, 3, 3, 0, 3], 700)])
@example(old=[([1], 0)], new=[([1, 1, 1, 2], 0)])
def test_a_dry_run_tells_the_bytes_that_a_device_then_pulls(old: Files, new: Files) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layouts, releases = zip(*(published(folder, *one) for one in (("1.0", old), ("2.0", new))), strict=True)
        world = World(folder / "device")
        for release in releases:
            world.controller.add(release)
        world.connect()
        with StagedFleet(folder / "host", dict(zip(("1.0", "2.0"), layouts, strict=True))) as fleet:
            fleet.add(1, TARGET)
            for version, release in zip(("1.0", "2.0"), releases, strict=True):
                said = fleet.service.rollout_plan(f"{MODEL}:{version}", policy=Policy(min_per_target=1)).bytes
                before = pulled(world)
                world.desire(int(float(version)), release, names=(MODEL,))
                world.settle()
                serving(world, release, MODEL)
                assert said == pulled(world) - before, version
                fleet.settle(version)
