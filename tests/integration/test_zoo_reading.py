"""rapidocr's three models (PP-OCRv6 small), compiled and run in a row by Kedge, read what rapidocr itself reads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.support import foreign, written_pages
from tests.support.installed import install

import kedge
from kedge_agent import Model

pytestmark = [pytest.mark.zoo, pytest.mark.timeout(3600)]

PAGES = 24
_ALLOWED = 0.02
"""Share of rapidocr's lines that may be read otherwise: the corners of a region differ by a pixel, and with them what
is left of a line that the picture's edge cuts off."""
_THEIRS = """
import json, sys
from pathlib import Path
for folder in sys.argv[3:]:
    sys.path.append(folder)
from rapidocr import RapidOCR
engine = RapidOCR(params={"Global.log_level": "error"})
read = {}
for path in sorted(Path(sys.argv[1]).glob("*.png")):
    found = engine(str(path))
    read[path.name] = list(found.txts or ())
Path(sys.argv[2]).write_text(json.dumps(read))
"""


def theirs(pages: Path, out: Path) -> dict[str, list[str]]:
    """The lines that rapidocr reads on each page, in a process of its own."""
    needed = ("rapidocr", "opencv-python-headless", "pyclipper", "shapely", "omegaconf", "colorlog")
    folders = [str(foreign.package(name)) for name in needed]
    subprocess.run([sys.executable, "-c", _THEIRS, str(pages), str(out), *folders], check=True, timeout=1800)
    read: dict[str, list[str]] = json.loads(out.read_text())
    return read


def test_three_models_in_a_row_read_what_rapidocr_reads(tmp_path: Path) -> None:
    pages = written_pages.save(tmp_path / "pages", PAGES)
    models = foreign.package("rapidocr") / "rapidocr" / "models"
    (tmp_path / "find.toml").write_text(
        'task = "ocr"\n[then]\nmodel = "read"\nturned_by = "direction"\nanswer_floor = 0.5\nmost = 1000\n'
    )
    (tmp_path / "degrees.txt").write_text("0\n180\n")
    for name, file, how in (
        ("find", "PP-OCRv6_det_small.onnx", {"pipeline": tmp_path / "find.toml"}),
        ("direction", "ch_ppocr_mobile_v2.0_cls_mobile.onnx", {"task": "ocr", "labels": tmp_path / "degrees.txt"}),
        ("read", "PP-OCRv6_rec_small.onnx", {"task": "ocr"}),
    ):
        kedge.compile(
            models / file, name=name, version="1", targets=["generic-cpu"], calibration=pages, evaluation=pages,
            out=tmp_path / name, quantize="precision=float32", max_drop=1.0, calibration_samples=8,
            evaluation_samples=8, **how,
        )  # fmt: skip
        install(tmp_path / "state", tmp_path / name)
    expected = theirs(pages, tmp_path / "theirs.json")
    others = whole = in_order = 0
    with Model("find", state=tmp_path / "state") as model:
        for name, lines in expected.items():
            read = [region.then.text for region in model(pages / name)]
            others += max((Counter(lines) - Counter(read)).total(), (Counter(read) - Counter(lines)).total())
            whole += len(lines)
            in_order += read == lines
    print(f"{whole - others} of {whole} lines as rapidocr reads them; {in_order} of {PAGES} pages in the same order")
    assert whole > 200
    assert others <= _ALLOWED * whole
    # Rows of tilted pages are told by the height of the letters here, by ten pixels there.
    assert in_order >= PAGES // 2
