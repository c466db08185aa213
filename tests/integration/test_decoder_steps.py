"""``--step`` for language models: width, heads and layers go, distillation brings back most of what that cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import decoders, requirements

import kedge
from kedge_agent import Model
from kedge_protocol.errors import ConfigError, ModelError

SHARED = requirements.SHARED / "generation" / "stories260k"
SEQUENCES = 64


def random_texts(place: Path) -> dict[str, Path]:
    import numpy as np

    random = np.random.default_rng(3)
    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text("".join(chr(40 + at) for at in random.integers(0, 50, 3000)))
    return {name: place / f"{name}.txt" for name in ("calibration", "evaluation")}


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts that the float model wrote itself."""
    path = tmp_path_factory.mktemp("stories")
    for name in ("calibration", "evaluation"):
        (path / f"{name}.txt").write_text("Once upon a time, there was a little girl. " * 60)
    release = kedge.compile(
        SHARED, name="stories", version="0.1", targets=["generic-cpu"], out=path / "float",
        quantize="precision=float32", slots=8,
        calibration=path / "calibration.txt", evaluation=path / "evaluation.txt",
    )  # fmt: skip
    with Model(release.path, target="generic-cpu") as model:
        for name, first, count in (("calibration", 0, SEQUENCES), ("evaluation", 1000, 12)):
            texts = []
            for batch in range(first, first + count, 32):
                streams = [
                    model.generate("", stream=True, max_tokens=255, temperature=1.0, seed=seed, ignore_end=True)
                    for seed in range(batch, min(batch + 32, first + count))
                ]
                texts += [stream.finish().text for stream in streams]
            (path / f"{name}.txt").write_text("\n".join(texts))
    return path


@pytest.mark.shared_data
def test_a_quarter_of_the_width_gone_costs_half_as_much_after_distillation(stories: Path) -> None:
    release = kedge.compile(
        SHARED, name="stories", version="1.0", targets=["generic-cpu"], out=stories / "out",
        calibration=stories / "calibration.txt", evaluation=stories / "evaluation.txt",
        step=("prune-width:ratio=0.25", "distil:steps=60,batch=8,held_back=0.1"), quantize="precision=float32",
        max_perplexity="2x",
    )  # fmt: skip
    assert release.generation is not None
    (target,) = release.generation.targets
    cut, repaired = target.steps
    assert cut.figures.kl > 0.01
    assert repaired.figures.kl <= 0.5 * cut.figures.kl
    assert cut.parameters == repaired.parameters
    # The bundle is what the steps made: the runtime says the same as torch.
    assert target.attempt.figures.kl == pytest.approx(repaired.figures.kl, rel=0.01, abs=1e-4)
    assert target.attempt.label.startswith("prune-width ratio=0.25 + distil")
    with Model(release.path, target="generic-cpu") as model:
        assert model.generate("Once upon a time", max_tokens=30).text.startswith(", there was")


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2"])
def test_heads_and_layers_go_and_the_runtime_agrees_with_torch(name: str, tmp_path: Path) -> None:
    folder = decoders.folder(tmp_path / "model", name)
    release = kedge.compile(
        folder, name="tiny", version="1.0", targets=["generic-cpu", "rpi5"], out=tmp_path / "out",
        **random_texts(tmp_path), step=("prune-heads:ratio=0.5,samples=8", "drop-layers:count=1", "prune-width"),
        quantize="precision=float32", max_perplexity="1000x",
    )  # fmt: skip
    assert release.generation is not None
    first, second = release.generation.targets
    assert first.steps == second.steps
    for target in (first, second):
        assert target.attempt.figures.kl == pytest.approx(target.steps[-1].figures.kl, rel=1e-3, abs=1e-4)
    heads, layers, width = first.steps
    assert heads.parameters > layers.parameters > width.parameters
    (note,) = layers.notes
    assert note.startswith("drop-layers: layers ")


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("equalize", "is not for language models"),
        ("drop-layers:count=3", "the model has 3 layers"),
        ("prune-width:importance=measured", "'measured' is not for language models"),
        ("distil:mixup=true", "mixup is not for language models"),
        ('distil:layers=["0:1"]', "names blocks of a teacher, and none is given"),
        ("prune-heads:leave=[\"q\"]", "a language model has none"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_work_is_refused(step: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        kedge.compile(
            decoders.folder(tmp_path / "model", "llama"), name="tiny", version="1.0", targets=["generic-cpu"],
            out=tmp_path / "out", step=(step,), **random_texts(tmp_path),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_student_of_other_depth_and_width_learns_from_the_teacher_that_judges_it(tmp_path: Path) -> None:
    teacher = decoders.folder(tmp_path / "teacher", "qwen2")
    narrow = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    student = decoders.folder(tmp_path / "student", "llama", changed={**narrow, "head_dim": 12})
    step = f'distil:teacher={teacher},steps=40,batch=8,learning_rate=0.01,attention_weight=0.5,layers=["0:0","1:2"]'
    release = kedge.compile(
        student, name="tiny", version="1.0", targets=["generic-cpu"], out=tmp_path / "out", **random_texts(tmp_path),
        step=(step,), quantize="precision=float32", max_perplexity="1000x",
    )  # fmt: skip
    alone = kedge.compile(
        teacher, name="tiny", version="1.0", targets=["generic-cpu"], out=tmp_path / "teachers",
        calibration=tmp_path / "calibration.txt", evaluation=tmp_path / "evaluation.txt", quantize="precision=float32",
    )  # fmt: skip
    assert release.generation is not None
    assert alone.generation is not None
    (target,), (reference,) = release.generation.targets, alone.generation.targets
    (learned,) = target.steps
    assert learned.measured["loss_after"] < 0.8 * learned.measured["loss_before"]
    assert learned.figures.reference == pytest.approx(reference.attempt.figures.reference, rel=1e-4)
    assert target.attempt.figures.kl == pytest.approx(learned.figures.kl, rel=1e-3, abs=1e-4)
    assert "judges instead of the model" in learned.notes[0]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wider", r"has other tokens \(100\) than the model \(96\)"),
        ("evaluation.txt", "is no language model that can be trained towards"),
        ("nosuch", "there is no such file or folder"),
    ],
)
def test_a_teacher_that_cannot_teach_is_refused(name: str, said: str, tmp_path: Path) -> None:
    decoders.folder(tmp_path / "wider", "qwen2", changed={"vocab_size": 100})
    with pytest.raises(ModelError, match=said):
        kedge.compile(
            decoders.folder(tmp_path / "model", "llama"), name="tiny", version="1.0", targets=["generic-cpu"],
            out=tmp_path / "out", **random_texts(tmp_path), step=(f"distil:teacher={tmp_path / name}",),
        )  # fmt: skip
