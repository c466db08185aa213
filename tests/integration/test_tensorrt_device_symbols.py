"""Every name of TensorRT and CUDA that the device half uses exists in NVIDIA's own packages, version by version.

The device half is run against fakes. Here the fakes' names, and those that recipes hold, are looked up in the real
bindings, which are loaded over stubs of NVIDIA's libraries; so is each function of CUDA in cuda-python's sources.
"""

from __future__ import annotations

import ast
import enum
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from tests.support import nvidia, wheels

from kedge_targets.backends.tensorrt import cuda, recipe

BINDINGS = {
    "8.6": "tensorrt-bindings==8.6.1",
    "10.3": "tensorrt-cu12-bindings==10.3.0",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
CUDA = ("cuda-bindings==12.9.4", "cuda-bindings==13.0.3")


def offered(fake: Any) -> dict[str, list[str]]:
    """What a fake package has: name → its public attributes, or an enumeration's members."""
    found: dict[str, list[str]] = {}
    for name in fake.__all__:
        one = getattr(fake, name)
        if isinstance(one, type) and issubclass(one, enum.Enum):
            found[name] = list(one.__members__)
        elif isinstance(one, type):
            # Capitals are the fakes' own settings.
            public = (key for cls in one.__mro__[:-1] for key in vars(cls) if not key.startswith("_"))
            found[name] = sorted({key for key in public if not key.isupper()})
        else:
            found[name] = []
    return found


@pytest.mark.needs("cc", "readelf")
@pytest.mark.parametrize("version", list(BINDINGS))
def test_every_name_of_the_fake_exists_in_the_real_bindings(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = nvidia.device(tmp_path, monkeypatch, version)
    try:
        import tensorrt as fake  # the fake: the device put it on the path

        names = offered(fake)
        told = str(fake.__version__)
    finally:
        device.remove()
    assert len(names) >= 18
    assert {"execute_async_v3", "set_tensor_address"} <= set(names["IExecutionContext"])
    real, found = wheels.missing_from_bindings(BINDINGS[version], names, tmp_path)
    assert real == told
    assert {name: one for name, one in found.items() if not one["there"] or one["missing"]} == {}


@pytest.mark.needs("cc", "readelf")
@pytest.mark.parametrize("version", list(BINDINGS))
def test_every_flag_of_a_recipe_exists_in_the_real_bindings(version: str, tmp_path: Path) -> None:
    [line] = [line for line in recipe.LINES if line.holds(BINDINGS[version].rpartition("=")[2])]
    builder = sorted({flag for flags in line.builder_flags.values() for flag in flags})
    names = {"NetworkDefinitionCreationFlag": list(line.network_flags), "BuilderFlag": builder}
    _, found = wheels.missing_from_bindings(BINDINGS[version], names, tmp_path)
    assert found == {name: {"there": True, "missing": []} for name in names}


@pytest.mark.needs("cc", "readelf")
def test_a_name_that_a_version_lacks_is_found_out(tmp_path: Path) -> None:
    wanted = {"BuilderFlag": ["INT8", "TF32"], "IProgressMonitor": [], "NoSuchClass": [], "Builder": ["nothing"]}
    _, old = wheels.missing_from_bindings(BINDINGS["8.6"], wanted, tmp_path)
    _, new = wheels.missing_from_bindings(BINDINGS["11"], wanted, tmp_path)
    assert (old["BuilderFlag"]["missing"], new["BuilderFlag"]["missing"]) == ([], ["INT8"])
    assert (old["IProgressMonitor"]["there"], new["IProgressMonitor"]["there"]) == (False, True)
    assert not new["NoSuchClass"]["there"]
    assert new["Builder"]["missing"] == ["nothing"]


def cuda_names() -> tuple[set[str], set[tuple[str, str]]]:
    """Functions that the device half calls, and the members of enumerations that it uses."""
    functions, members = set(), set()
    for node in ast.walk(ast.parse(inspect.getsource(cuda))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"cuda[A-Z]\w+", node.value):
            functions.add(node.value)
        if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
            owner = node.value
            if isinstance(owner, ast.Attribute):
                members.add((owner.attr, node.attr))
            elif isinstance(owner, ast.Name) and owner.id == "attribute":
                members.add(("cudaDeviceAttr", node.attr))
            elif isinstance(owner, ast.Name) and owner.id == "cuda":
                functions.add(node.attr)
    return functions, members


@pytest.mark.parametrize("requirement", CUDA)
def test_every_function_of_cuda_exists_in_cuda_python(requirement: str) -> None:
    functions, members = cuda_names()
    assert {"cudaMallocHost", "cudaMemcpyAsync", "cudaGraphLaunch", "cudaGetErrorString"} <= functions
    assert ("cudaDeviceAttr", "cudaDevAttrComputeCapabilityMajor") in members
    assert ("cudaMemcpyKind", "cudaMemcpyHostToDevice") in members
    source = (wheels.unpacked(requirement) / "cuda" / "bindings" / "runtime.pyx").read_text(encoding="utf-8")
    defined = set(re.findall(r"^def (cuda\w+)\(", source, re.MULTILINE))
    assert functions - defined == set()
    for enumeration, member in members:
        body = re.search(
            rf"^class {enumeration}\(IntEnum\):(.*?)^(?:class|cdef|def) ", source, re.MULTILINE | re.DOTALL
        )
        assert body is not None, enumeration
        assert re.search(rf"^    {member} = ", body[1], re.MULTILINE), member


def test_the_fake_of_cuda_has_the_real_ones_parameters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = nvidia.device(tmp_path, monkeypatch, "11")
    try:
        fake = cuda.library()
        ours = {name: list(inspect.signature(getattr(fake, name)).parameters) for name in cuda_names()[0]}
    finally:
        device.remove()
    source = (wheels.unpacked(CUDA[-1]) / "cuda" / "bindings" / "runtime.pyx").read_text(encoding="utf-8")
    real = {}
    for name, parameters in re.findall(r"^def (cuda\w+)\((.*?)\):", source, re.MULTILINE):
        stated = [one.partition(":")[0].replace("not None", "").split() for one in parameters.split(",") if one.strip()]
        real[name] = [words[-1] for words in stated]
    assert ours == {name: real[name] for name in ours}
