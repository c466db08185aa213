"""The files of a report in a release folder."""

from __future__ import annotations

import json
from pathlib import Path

from kedge.report.document import Report
from kedge.report.html import render
from kedge_protocol import codec

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def write(report: Report, folder: Path) -> None:
    """Write both files into ``folder``."""
    document = json.dumps(codec.unstructure(report), indent=2, ensure_ascii=False) + "\n"
    (folder / JSON_FILE).write_text(document, encoding="utf-8")
    (folder / HTML_FILE).write_text(render(report), encoding="utf-8")


def read(folder: Path) -> Report | None:
    """The report of a release folder; None where there is none (a copied layout)."""
    path = folder / JSON_FILE
    if not path.is_file():
        return None
    return codec.decode(path.read_bytes(), Report, where=str(path))
