"""A language model in parts: the parts compute what the whole computes, find each other, and refuse others."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.support import decoders, split_models
from tests.support.authority import Authority
from tests.support.split_models import Parts
from tests.support.waiting import wait_for

import kedge
from kedge.importing.decoders import reading
from kedge.quantization.decoder_layers import LayerSource, QuantizedLayers, table
from kedge.quantization.decoder_scheme import Scheme
from kedge_agent.generation.engine import Engine
from kedge_agent.serving import standalone
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.slots import ModelFolder
from kedge_agent.split.link import Hello, RemoteStage
from kedge_agent.split.settings import SplitSettings
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import ConfigError, InputError, KedgeError, NeighbourError, TargetError, VerificationError
from kedge_targets import registry
from kedge_targets.decoder.contract import Ends
from kedge_targets.decoder.stages import StagedDecoder

PROMPT, COUNT = "abc", 60
CONTEXT = 256


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("name", list(decoders.CONFIGURATIONS))
def test_parts_compute_the_same_bits_as_the_whole(name: str, precision: str, tmp_path: Path) -> None:
    # Several windows long, so that the caches of layers with one drop positions.
    sizes = {"n_positions" if name == "gpt2" else "max_position_embeddings": CONTEXT}
    decoder = reading.read(decoders.folder(tmp_path / "model", name, changed=sizes))
    scheme = Scheme(precision=precision, embedding=precision, method="plain")
    compiler, runtime = registry.compiler("onnxruntime").decoders(), registry.runtime("onnxruntime")
    assert compiler is not None
    spec, weights = decoder.spec, decoder.weights
    names = ["norm", *(["norm.bias"] if weights.has_bias("norm") else [])]
    ends = Ends(
        embedding=table(weights.outer("embedding"), scheme),
        positions=weights.outer("positions") if spec.learned_positions else None,
        norm={one: weights.outer(one) for one in names},
        head=None if spec.tied else table(weights.outer("head"), scheme),
    )
    source = LayerSource(spec, weights, compiler, CONTEXT)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    layers = QuantizedLayers(source, scheme, [], lambda done, total: None)
    whole = compiler.lower(spec, ends, layers, context=CONTEXT, workdir=tmp_path / "whole")
    parts = compiler.lower_parts(spec, ends, layers, (1, 2), context=CONTEXT, workdir=tmp_path / "parts")
    assert whole.position_bytes == sum(part.position_bytes for part in parts)
    assert whole.window_bytes == sum(part.window_bytes for part in parts)
    one = runtime.load_decoder(whole.files[whole.entry], {"threads": 1}, slots=2, context=CONTEXT)
    stages = [runtime.load_stage(part.files[part.entry], {"threads": 1})(2, CONTEXT) for part in parts]
    several = StagedDecoder(stages, slots=2, context=CONTEXT)
    assert several.vocabulary == one.vocabulary
    assert several.cache_bytes == one.cache_bytes == 2 * (CONTEXT * whole.position_bytes + whole.window_bytes)
    assert bool(one.windows) is (name in ("mistral", "gemma3"))
    assert set(several.windows) == set(one.windows)
    prompt = np.random.default_rng(0).integers(3, 90, 150).tolist()
    np.testing.assert_array_equal(one.extend(0, prompt, keep=3), several.extend(0, prompt, keep=3))
    for session in (one, several):
        session.copy(0, 1, 150)
    np.testing.assert_array_equal(one.extend(1, prompt[:9], keep=3), several.extend(1, prompt[:9], keep=3))
    for token in range(3, 83):
        expected, found = (session.step({0: token, 1: token + 13}) for session in (one, several))
        for slot in (0, 1):
            np.testing.assert_array_equal(found[slot], expected[slot])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("split")
    split_models.compiled(path, "whole", parts=None)
    split_models.compiled(path, "two", parts=2)
    return path


@pytest.fixture
def two(place: Path, tmp_path: Path) -> Iterator[Parts]:
    parts = Parts(tmp_path, place / "two")
    yield parts
    parts.close()


def test_two_devices_write_what_one_writes_and_several_sequences_too(place: Path, two: Parts) -> None:
    two.load(1)
    first = two.load(0)
    prompts = [PROMPT, "xyz", "a longer prompt than the others", "q", "rst"]
    expected = [split_models.greedy(place / "whole", one, COUNT) for one in prompts]
    assert first.generate(PROMPT, max_tokens=COUNT, ignore_end=True).tokens == expected[0]
    with ThreadPoolExecutor(5) as pool:
        found = pool.map(lambda one: first.generate(one, max_tokens=COUNT, ignore_end=True).tokens, prompts)
        assert list(found) == expected
    # What a slot holds on both devices is read no second time, whichever engine's it is.
    for prompt in ("one of them", "and another"):
        first.generate(prompt, max_tokens=1)
        assert first.generate(prompt, max_tokens=1).cached_tokens == len(prompt)


def test_three_devices_pass_on_what_they_compute(place: Path, tmp_path: Path) -> None:
    split_models.compiled(tmp_path, "three", parts=3)
    three = Parts(tmp_path, tmp_path / "three")
    try:
        for index in (2, 1, 0):
            three.load(index)
        found = three.models[0].generate(PROMPT, max_tokens=COUNT, ignore_end=True)
        assert found.tokens == split_models.greedy(place / "whole", PROMPT, COUNT)
        three.load(1, next={"writer-part-2": "127.0.0.1:9"})
        with pytest.raises(NeighbourError, match="the link is lost"):
            Parts.load(three, 0).generate(PROMPT)
    finally:
        three.close()


def test_figures_and_bits_of_the_weights_are_the_wholes(place: Path) -> None:
    whole, first = kedge.Release.open(place / "whole"), kedge.Release.open(place / "two" / "part-1")
    assert whole.generation is not None
    assert first.generation is not None
    one, *_ = whole.generation.targets
    assert [part.attempt.figures for part in first.generation.targets] == [one.attempt.figures] * 2
    assert [part.layers for part in first.generation.targets] == [(0, 1), (1, 3)]
    assert sum(part.position_bytes for part in first.generation.targets) == one.position_bytes


def test_layers_with_a_window_keep_a_window_on_another_device_too(tmp_path: Path) -> None:
    texts = "".join(chr(40 + at) for at in np.random.default_rng(1).integers(0, 50, 400))
    layers = {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}
    release = split_models.compiled(tmp_path, "whole", parts=None, kind="gemma3", changed=layers, slots=2)
    split_models.compiled(tmp_path, "two", parts=2, kind="gemma3", changed=layers, slots=2)
    parts = Parts(tmp_path, tmp_path / "two")
    try:
        second, first = parts.load(1), parts.load(0)
        whole, *each = (
            one.generation
            for one in (Layout(release).bundle("generic-cpu").config, first.config, second.config)
            if one.generation is not None
        )
        assert sum(spec.cache_bytes for spec in each) == whole.cache_bytes
        assert [spec.window_bytes for spec in each] == [0, whole.window_bytes]
        assert second.config.resources.memory_bytes < first.config.resources.memory_bytes
        assert second.config.runtimes[0].minimum == "1.31"
        # Both slots write far beyond the window; then a beginning comes again that only some caches still have.
        asked = [(texts[:200], 150), (texts[200:], 150), (texts[:200], 20), (texts[:220], 40), (texts[:90], 40)]
        expected = [split_models.greedy(release, *one) for one in asked]
        with ThreadPoolExecutor(2) as pool:
            both = pool.map(lambda one: first.generate(one[0], max_tokens=one[1], ignore_end=True), asked[:2])
            found = [answer.tokens for answer in both]
        found += [first.generate(prompt, max_tokens=count, ignore_end=True).tokens for prompt, count in asked[2:]]
        assert found == expected
    finally:
        parts.close()


def test_each_part_declares_its_memory_so_that_it_may_be_most_of_a_device(two: Parts) -> None:
    for index in (1, 0):
        model = two.load(index)
        assert model.figures["memory_bytes"] == model.config.resources.memory_bytes


def test_parts_are_not_served_without_an_agent_and_it_says_so(place: Path, tmp_path: Path) -> None:
    for part in (1, 2):
        with pytest.raises(InputError, match=r"split over devices\. Roll it out: agents know"):
            standalone.install(str(place / "two" / f"part-{part}"), tmp_path, target=None, state=tmp_path)


def test_a_device_that_is_not_there_is_named_at_once_and_the_model_heals(place: Path, two: Parts) -> None:
    first = two.load(0)
    with pytest.raises(NeighbourError, match=f"after these, {two.addresses[1]}: the link is lost"):
        first.generate(PROMPT)
    two.load(1)
    assert first.generate(PROMPT, max_tokens=5, ignore_end=True).tokens == split_models.greedy(
        place / "whole", PROMPT, 5
    )


@pytest.mark.parametrize("makes_room", [False, True])
def test_a_replaced_part_is_gone_as_soon_as_nobody_uses_it(place: Path, two: Parts, makes_room: bool) -> None:
    second, first = two.load(1, seconds=3.0), two.load(0)
    first.generate(PROMPT, max_tokens=2)
    leaving = second.loaded().retire(makes_room=makes_room)
    second.close()
    if not makes_room:
        # It goes on for the connection it has, which the device before it closes when it switches.
        assert first.generate(PROMPT, max_tokens=5, ignore_end=True).tokens == split_models.greedy(
            place / "whole", PROMPT, 5
        )
        assert leaving() is not None
        first.close()
    wait_for(lambda: leaving() is None, what="the replaced part is gone")
    if makes_room:
        with pytest.raises(NeighbourError, match="it holds none"):
            first.generate(PROMPT)


def test_a_served_part_makes_way_in_memory_and_comes_back(two: Parts, tmp_path: Path) -> None:
    two.load(1, seconds=3.0).close()
    first = two.load(0)
    models, folder = ServedModels(tmp_path / "device-1"), ModelFolder(tmp_path / "device-1", "writer-part-2")
    current = folder.current()
    assert current is not None

    def told(away: bool) -> bool:
        models.scan()
        served = folder.serving()
        return served is not None and (served.error is not None) is away

    wait_for(lambda: told(away=False), what="the part serves")
    first.generate(PROMPT, max_tokens=2)
    folder.give_way(current.digest)
    wait_for(lambda: told(away=True), what="the part has made way")
    with pytest.raises(NeighbourError, match="it holds none"):
        first.generate(PROMPT)
    folder.take_back()
    wait_for(lambda: told(away=False), what="the part serves again")
    assert first.generate(PROMPT, max_tokens=5, ignore_end=True).tokens
    entry = models.get("writer-part-2")
    assert entry is not None
    assert entry.model is not None
    entry.model.close()


def test_a_device_that_says_nothing_is_given_up_after_the_deadline(two: Parts) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        first = two.load(0, next={"writer": address}, seconds=0.5)
        with pytest.raises(NeighbourError, match=r"no answer within 0\.5 s"):
            first.generate(PROMPT)


@pytest.mark.parametrize("other", ["version", "model"])
def test_the_part_of_another_version_or_model_is_refused_by_its_digest(
    other: str, two: Parts, place: Path, tmp_path: Path
) -> None:
    changed = {"version": "2.0"} if other == "version" else {"seed": 1.5}
    foreign = Parts(tmp_path / "foreign", split_models.compiled(tmp_path, "other", parts=2, **changed))
    foreign.load(1)
    try:
        first = two.load(0, next={"writer": foreign.addresses[1]})
        wanted = Layout(two.releases[1]).bundle("generic-cpu").digest
        there = Layout(foreign.releases[1]).bundle("generic-cpu").digest
        assert wanted != there
        with pytest.raises(NeighbourError, match=f"does not hold the bundle {wanted[:19]}") as refused:
            first.generate(PROMPT)
        assert there[:19] in str(refused.value)
    finally:
        foreign.close()


def test_only_devices_with_a_certificate_of_the_authority_are_answered(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path, "stranger")
    cert, key = map(str, authority.certificate("dev"))
    known = SplitSettings(ca=str(authority.ca), cert=cert, key=key)
    parts = Parts(tmp_path, place / "two", known)
    try:
        parts.load(1)
        first = parts.load(0)
        assert first.generate(PROMPT, max_tokens=5, ignore_end=True).tokens == split_models.greedy(
            place / "whole", PROMPT, 5
        )
        first.close()
        bad_cert, bad_key = map(str, stranger.certificate("other"))
        # Its own authority's certificate, a client that trusts anybody, and one without TLS.
        for changed in (
            {"cert": bad_cert, "key": bad_key},
            {"ca": str(stranger.ca)},
            {"ca": None, "cert": None, "key": None},
        ):
            with pytest.raises(NeighbourError, match=r"the link is lost|no answer"):
                parts.load(0, **changed).generate(PROMPT)
            parts.models[0].close()
    finally:
        parts.close()


def test_a_link_beyond_this_machine_without_certificates_is_refused_unless_it_is_wanted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for settings in (SplitSettings(listen="0.0.0.0:7433"), SplitSettings(next={"m": "10.0.0.8:7433"})):
        with pytest.raises(ConfigError, match="without certificates"):
            settings.checked()
        assert replace(settings, insecure=True).checked().insecure
        assert "OPEN TO EVERYBODY" in caplog.text
    assert SplitSettings(listen="127.0.0.1:7433").checked()


def test_what_does_not_belong_on_the_link_ends_it_and_harms_nobody(place: Path, two: Parts) -> None:
    two.load(1)
    digest = Layout(two.releases[1]).bundle("generic-cpu").digest
    host, port = two.addresses[1].split(":")
    ones = np.zeros((1, 1, 32), np.float32)
    for raw in (b"\xff" * 64, b"\x00\x00\x00\x05[1,2]", b""):
        with socket.create_connection((host, int(port)), 5) as strange:
            strange.sendall(raw)
    settings = SplitSettings(seconds=60.0)
    for slots in (0, 5, -1):
        stage = RemoteStage(settings, two.addresses[1], Hello(bundle=digest, slots=slots), channels=32)
        with pytest.raises(NeighbourError):
            stage.ready()
    for first, rows, length, copied in (
        (3, 1, 0, 0),
        (-1, 1, 0, 0),
        (0, 2, 0, 0),
        (0, 1, 512, 0),
        (0, 1, -1, 0),
        (0, 1, 0, 1),
    ):
        stage = RemoteStage(settings, two.addresses[1], Hello(bundle=digest, slots=1), channels=32)
        stage.ready()
        stage.copy(0, copied, 5)
        with pytest.raises(NeighbourError, match=r"a step|a copy"):
            stage.run(first, np.repeat(ones, rows, 0), np.full(rows, length), 1)
    found = two.load(0).generate(PROMPT, max_tokens=5, ignore_end=True)
    assert found.tokens == split_models.greedy(place / "whole", PROMPT, 5)


def test_parts_that_do_not_give_the_golden_vectors_together_write_nothing(two: Parts) -> None:
    second, first = two.load(1), two.load(0)
    session = first.loaded().generator.engine.session
    whole = session._whole  # type: ignore[attr-defined]
    whole.outputs["prefill"] += 1
    with pytest.raises(VerificationError, match="all parts together"):
        first.generate(PROMPT)
    whole.outputs["prefill"] -= 1
    assert first.generate(PROMPT, max_tokens=3).tokens
    assert second.detail == "part 2 of 2 (layers 1 to 2)"
    with pytest.raises(KedgeError, match="Ask the device with the first part"):
        second.generate(PROMPT)


def test_while_one_sequence_is_at_the_other_device_this_one_computes_another(two: Parts) -> None:
    """The first step of either engine is held until the other's is under way, too. Both sequences come at once, and
    each looks for an engine while the other one does."""
    two.load(1)
    first = two.load(0)
    first.generate(PROMPT, max_tokens=2)  # both devices are known to each other
    both, under_way = threading.Event(), 0
    lock, run, known = threading.Lock(), RemoteStage.run, Engine.known

    def held(stage: RemoteStage, *given: object) -> object:
        nonlocal under_way
        with lock:
            under_way += 1
            if under_way == 2:
                both.set()
        try:
            assert both.wait(120), "one engine waits for the other"
            return run(stage, *given)  # type: ignore[arg-type]
        finally:
            with lock:
                under_way -= 1

    def slowly(engine: Engine, prompt: Sequence[int]) -> int:
        time.sleep(0.1)
        return known(engine, prompt)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(RemoteStage, "run", held)
        patch.setattr(Engine, "known", slowly)
        list(pool.map(lambda one: first.generate(one, max_tokens=5, ignore_end=True), ("abc", "xyz")))
    assert both.is_set()


def test_what_cannot_be_split_is_refused_early(place: Path, tmp_path: Path) -> None:
    for parts, why in ((1, "1 is no number of parts"), (4, "4 parts for 3 layers"), (-2, "no number")):
        with pytest.raises(ConfigError, match=why):
            split_models.compiled(tmp_path, "out", parts=parts)
    with pytest.raises(ConfigError, match="2 parts for 3 targets"):
        split_models.compiled(tmp_path, "out", parts=2, targets=["generic-cpu", "rpi5", "generic-arm"])
    small = tmp_path / "small.toml"
    text = Path(registry.__file__).with_name("devices").joinpath("generic-cpu.toml").read_text()
    small.write_text(text.replace("generic-cpu", "small").replace("1_000_000_000", "20_000"))
    with pytest.raises(TargetError, match="the fullest of 2 devices"):
        split_models.compiled(tmp_path, "out", parts=2, targets=[str(small)])
    assert not (tmp_path / "out").exists()
    (tmp_path / "m.onnx").write_bytes(b"")
    with pytest.raises(ConfigError, match="language models only"):
        kedge.compile(
            tmp_path / "m.onnx", name="m", version="1", targets=["generic-cpu"], split=2,
            calibration=tmp_path, evaluation=tmp_path, out=tmp_path / "o",
        )  # fmt: skip


def test_a_device_with_more_memory_gets_more_layers(tmp_path: Path) -> None:
    text = Path(registry.__file__).with_name("devices").joinpath("generic-cpu.toml").read_text()
    targets = []
    for name, size in (("large", 2_000_000_000), ("little", 400_000_000)):
        targets.append(str(tmp_path / f"{name}.toml"))
        Path(targets[-1]).write_text(text.replace("generic-cpu", name).replace("1_000_000_000", str(size)))
    out = split_models.compiled(tmp_path, "out", parts=2, targets=targets)
    assert Layout(out / "part-1").bundle("large").config.generation.part.layers == (0, 2)  # type: ignore[union-attr]
    assert Layout(out / "part-2").bundle("little").config.generation.part.layers == (2, 3)  # type: ignore[union-attr]


def test_a_device_that_is_not_told_where_the_others_are_says_so(two: Parts) -> None:
    with pytest.raises(ConfigError, match=r"\[split.next\]"):
        two.load(0, next={})
    with pytest.raises(ConfigError, match="Set listen in"):
        two.load(1, listen=None)
