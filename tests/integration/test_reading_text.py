"""Three models in a row find lines, turn them and read them: as bundles, from Python and over HTTP, and on a runtime
that needs fixed sizes."""

from __future__ import annotations

import copy
import dataclasses
import io
import shutil
from pathlib import Path

import pytest
from tests.support import blocks
from tests.support.installed import install
from tests.support.serving import ask

import kedge
from kedge_agent import Model, proving, slots
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_protocol.bundle.pipeline import Fit
from kedge_protocol.errors import ConfigError, InputError
from kedge_targets import proof
from kedge_targets.pipeline import examples

LINES = [(30, 20, "rgb"), (170, 24, "bb"), (40, 90, "ggrrb"), (25, 160, "brg")]
TEXTS = ["|rgb", "|bb", "|ggrrb", "|brg"]


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device with a finder, a classifier of directions and a reader."""
    folder = tmp_path_factory.mktemp("reading")
    pages = blocks.pages(folder / "pages")
    (folder / "find.toml").write_text(
        'task = "ocr"\n[picture]\nwidth = 320\nheight = 256\nshortest = 64\n[regions]\ngrow = 0.1\n'
        '[then]\nmodel = "read"\nturned_by = "direction"\nanswer_floor = 0.5\n'
        'releases = ["read", "direction"]\n'
    )
    (folder / "degrees.txt").write_text("0\n180\n")
    (folder / "letters.txt").write_text("\n".join(blocks.LETTERS))
    for name, make, how in (
        ("direction", blocks.direction, {"task": "ocr", "labels": folder / "degrees.txt"}),
        ("read", blocks.reader, {"task": "ocr", "labels": folder / "letters.txt"}),
        ("find", blocks.finder, {"pipeline": folder / "find.toml"}),
    ):
        kedge.compile(
            make(folder / f"{name}.onnx"), name=name, version="1", targets=["generic-cpu"], calibration=pages,
            evaluation=pages, out=folder / name, quantize="precision=float32", max_drop=1.0, **how,
        )  # fmt: skip
        install(folder / "state", folder / name)
    return folder


def test_a_page_becomes_its_lines_in_reading_order(state: Path) -> None:
    with Model("find", state=state / "state") as model:
        found = model(blocks.page(LINES))
        assert [one.then.text for one in found] == TEXTS
        assert min(one.then.score for one in found) > 0.9
        xs, ys = zip(*found[0].corners, strict=True)
        assert (min(xs), min(ys)) == pytest.approx((30, 20), abs=10)
        assert list(model.stream([blocks.page(LINES)] * 3)) == [found] * 3
        assert model(blocks.page([])) == []


@pytest.mark.parametrize("angle", [6, -9, 180, 187])
def test_tilted_and_turned_pages_are_read(state: Path, angle: int) -> None:
    with Model("find", state=state / "state") as model:
        found = [one.then.text for one in model(blocks.page(LINES, angle=angle))]
    assert sorted(found) == sorted(TEXTS)


def test_pages_of_any_size_are_read(state: Path) -> None:
    with Model("find", state=state / "state") as model:
        for size in ((200, 90), (640, 400)):
            found = model(blocks.page([(20, 30, "rgbbg")], size=size))
            assert [one.then.text for one in found] == ["|rgbbg"]


def test_the_same_lines_over_http(state: Path) -> None:
    models = ServedModels(state / "state")
    models.scan()
    body = io.BytesIO()
    blocks.page(LINES).save(body, "PNG")
    answer = ask(
        InferenceHandler(models), "POST", "/v2/models/find/pipeline", body.getvalue(), content_type="image/png"
    )
    assert answer.status == 200
    assert [one["then"]["text"] for one in answer.body["answer"]] == TEXTS
    assert len(answer.body["answer"][0]["corners"]) == 4
    models.unload(models.versions("direction")[0])
    refused = ask(
        InferenceHandler(models), "POST", "/v2/models/find/pipeline", body.getvalue(), content_type="image/png"
    )
    assert "goes on to the model 'direction', which does not serve" in refused.body["error"]


def test_the_bundles_say_what_the_models_are(state: Path) -> None:
    with Model("find", state=state / "state") as find, Model("read", state=state / "state") as read:
        assert find.config.pipeline is not None
        assert find.config.pipeline.picture is not None
        assert find.config.pipeline.picture.fit is Fit.FREE
        assert find.config.pipeline.regions is not None
        assert find.inputs[0].shape[2:] == (None, None)
        assert read.config.pipeline is not None
        assert read.config.pipeline.picture is not None
        assert (read.config.pipeline.picture.width, read.config.pipeline.picture.widest) == (320, 3200)
        assert read(blocks.line("gb")).text == "|gb"


def test_a_chain_alone_is_told_what_it_lacks(state: Path) -> None:
    with Model(state / "find", target="generic-cpu") as model, pytest.raises(InputError, match="others="):
        model(blocks.page(LINES))


def test_then_needs_parts_of_a_picture(state: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text('task = "classification"\n[then]\nmodel = "read"\n')
    with pytest.raises(ConfigError, match=r"only with \[boxes\] or \[regions\]"):
        kedge.compile(
            state / "direction.onnx", name="x", version="1", targets=["generic-cpu"], calibration=state / "pages",
            evaluation=state / "pages", pipeline=tmp_path / "wrong.toml", out=tmp_path / "OUT",
        )  # fmt: skip


def prove(slot: slots.Slot, folder: Path) -> proof.ProveAnswer:
    """As the agent lets a worker prove a bundle.

    Args:
        folder: with the bundle's files; by default its slot.
    """
    config = slot.bundle().config
    request = proof.ProveRequest(
        folder=str(folder), config=str(slot.folder / slots.CONFIG_FILE), others=proving.others_of(slot.folder, config)
    )
    return proof.prove(request, lambda *_: None)


def current(state: Path, name: str) -> slots.Slot:
    slot = slots.ModelFolder(state, name).current()
    assert slot is not None
    return slot


def test_the_whole_row_is_proved_by_examples_of_pictures_and_texts(state: Path, tmp_path: Path) -> None:
    find = current(state / "state", "find")
    kept = examples.load(find.folder / examples.FILE)
    assert kept
    assert any(region["then"]["text"] for one in kept for region in one.answer)
    digests = {name: current(state / "state", name).digest for name in ("read", "direction")}
    assert all(one.others == digests for one in kept)
    assert str(state) not in (find.folder / slots.CONFIG_FILE).read_text()
    assert prove(find, find.folder).holds
    # Another text, of the same regions, is another answer.
    folder = tmp_path / "slot"
    shutil.copytree(find.folder, folder)
    answer = copy.deepcopy(kept[0].answer)
    answer[0]["then"]["text"] = "|other"
    examples.save([dataclasses.replace(kept[0], answer=answer)], folder / examples.FILE)
    refused = prove(find, folder)
    assert not refused.holds
    assert "example 0 is another" in refused.reason


def test_examples_of_a_row_say_nothing_of_other_bundles(state: Path, tmp_path: Path) -> None:
    shutil.copytree(state / "state", tmp_path / "state", symlinks=True)
    kedge.compile(
        blocks.reader(tmp_path / "read.onnx"), name="read", version="2", targets=["generic-cpu"],
        calibration=state / "pages", evaluation=state / "pages", out=tmp_path / "read",
        quantize="precision=float32", max_drop=1.0, task="ocr", labels=state / "letters.txt",
    )  # fmt: skip
    install(tmp_path / "state", tmp_path / "read")
    find = current(tmp_path / "state", "find")
    answer = prove(find, find.folder)
    assert answer.holds
    assert "another 'read' is here" in answer.detail
