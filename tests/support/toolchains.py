"""A toolchain made of one tiny wheel, so that installing can be tested without a network; and the real one."""

from __future__ import annotations

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

from kedge_protocol.errors import ToolchainError
from kedge_targets import toolchain
from tests.support import requirements

DRIVER = '''\
"""Answers with the version of the package "tiny"."""
import json, os, platform, sys
answers = os.fdopen(int(os.environ["KEDGE_ANSWER_FD"]), "w", buffering=1)
for line in sys.stdin:
    import tiny
    answer = {"python": platform.python_version(), "packages": {"tiny": tiny.VERSION}}
    print(json.dumps({"answer": answer}), file=answers)
'''


def wheel(folder: Path, *, version: str = "1.0", module: str = 'VERSION = "1.0"\n') -> tuple[Path, str]:
    """A wheel of the package ``tiny``, and its sha256."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tiny-{version}-py3-none-any.whl"
    info = f"tiny-{version}.dist-info"
    files = {
        "tiny.py": module,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{name},sha256={digest},{len(text)}")
        archive.writestr(f"{info}/RECORD", "\n".join([*rows, f"{info}/RECORD,,"]) + "\n")
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def declare(backends: Path, wheel_hash: str, *, driver: str = DRIVER, python: str = "", disk_bytes: int = 1) -> None:
    """Declare the toolchain ``tiny`` below ``backends``."""
    folder = backends / "tiny" / "toolchain"
    folder.mkdir(parents=True, exist_ok=True)
    version = python or f"{sys.version_info.major}.{sys.version_info.minor}"
    (folder / "toolchain.toml").write_text(
        f'description = "a test"\npython = ["{version}"]\ndisk_bytes = {disk_bytes}\n'
    )
    (folder / "requirements.txt").write_text(f"tiny==1.0 \\\n    --hash=sha256:{wheel_hash}\n")
    (folder / "driver.py").write_text(driver)


def required(name: str) -> toolchain.Toolchain:
    """The real toolchain ``name``; where it is not installed, see :func:`tests.support.requirements.missing`."""
    try:
        return toolchain.find(name)
    except ToolchainError as error:
        requirements.missing(f"the toolchain {name!r}", f"kedge toolchain install {name} ({error.what})")
