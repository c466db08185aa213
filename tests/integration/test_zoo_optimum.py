"""A decoder that optimum exported to ONNX is compiled and served as it is, and with its weights in codes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support import optimum

import kedge
from kedge_agent import Model

SHARED = Path(__file__).parents[2].parent / "shared" / "data" / "generation" / "stories260k"

pytestmark = [pytest.mark.zoo, pytest.mark.shared_data, pytest.mark.timeout(3600)]

_BEGINNING = ", there was a little girl named Lily. She loved to play outside in the park."


def compiled(model: Path, place: Path, out: str, quantize: str) -> kedge.Release:
    text = place / "text.txt"
    text.write_text("Once upon a time, there was a little girl. She loved to play outside. " * 60)
    return kedge.compile(
        model,
        name="stories",
        version="1.0",
        targets=["generic-cpu"],
        calibration=text,
        evaluation=text,
        out=place / out,
        quantize=quantize,
        max_perplexity="9x",
        slots=2,
    )


def test_an_export_of_optimum_writes_what_its_folder_writes(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip(f"the shared data are not there: {SHARED}")
    exported = optimum.exported(SHARED, tmp_path / "exported")
    releases = [
        compiled(model, tmp_path, out, "precision=float32") for model, out in ((SHARED, "own"), (exported, "taken"))
    ]
    texts = []
    for release in releases:
        with Model(release.path, target="generic-cpu") as model:
            texts.append(model.generate("Once upon a time", max_tokens=120).text)
    assert texts[0] == texts[1]
    assert texts[0].startswith(_BEGINNING)
    small = compiled(exported, tmp_path, "codes", "precision=int8")
    with Model(small.path, target="generic-cpu") as model:
        assert texts[0].startswith(model.generate("Once upon a time", max_tokens=20).text)
