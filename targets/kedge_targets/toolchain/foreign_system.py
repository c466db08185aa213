"""Makes the system of another processor in a folder: Debian's packages unpacked, a processor's description, and a
program ``bin/python`` that runs the system's Python by qemu-user. No root, no container, no change of this system."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from kedge_protocol.errors import ToolchainError
from kedge_targets.toolchain.declaration import Declaration

CPU_VARIABLE = "KEDGE_EMULATED_CPU"
"""The processor, by qemu's name, that ``bin/python`` emulates."""
PARTS = {"cortex-a53": "0xd03", "cortex-a72": "0xd08", "cortex-a76": "0xd0b"}
"""Processors that can be emulated → their part number, by which libraries know them."""

_DEBIAN = "arm64"
_QEMU = "qemu-aarch64"
_CORES = 4
_PYTHON = "3.11"
_LIBC = (17, 26, 27, 28, 31, 34, 35, 36)  # glibc 2.x, as tags of wheels; Debian 12 has 2.36
_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT_PRODUCTS = " atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
WRAPPER = """#!/bin/sh
here=$(dirname "$(dirname "$(readlink -f "$0")")")
cpu=${KEDGE_EMULATED_CPU:-cortex-a53}
export PYTHONPATH="$here/site" PYTHONHASHSEED=0
exec qemu-aarch64 -cpu "$cpu" -L "$here/systems/$cpu" "$here/systems/$cpu/usr/bin/python3.11" "$@"
"""


def make(declared: Declaration, folder: Path, step: Callable[[list[str]], None]) -> None:
    """Make the systems, one for each processor: they differ in what they say of it.

    Args:
        step: runs a command, and raises if it fails.

    Raises:
        ToolchainError: a program is missing, or a step failed.
    """
    for program in (_QEMU, "apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ToolchainError(
                f"needs {program}, which is not there",
                where=f"toolchain {declared.name!r}",
                remedy="Use Debian 12 with apt-get install qemu-user, or compile without it",
            )
    private, packages = folder / "apt", folder / "packages"
    for path in (private / "lists" / "partial", private / "archives" / "partial", packages, folder / "bin"):
        path.mkdir(parents=True)
    (private / "status").touch()
    apt = ["apt-get", *_private(private)]
    step([*apt, "update"])
    step(["env", "-C", str(packages), *apt, "download", *declared.system])
    first, *others = (folder / "systems" / cpu for cpu in PARTS)
    first.mkdir(parents=True)
    for package in sorted(packages.glob("*.deb")):
        step(["dpkg-deb", "-x", str(package), str(first)])
    for other in others:
        other.mkdir()
        for part in first.iterdir():
            (other / part.name).symlink_to(Path("..") / first.name / part.name)
    for cpu in PARTS:
        _describe(folder / "systems" / cpu, cpu)
    python = folder / "bin" / "python"
    python.write_text(WRAPPER, encoding="utf-8")
    python.chmod(0o755)
    for path in (private, packages):
        shutil.rmtree(path)


def pip_options(folder: Path) -> list[str]:
    """Return pip's options that take wheels for the other processor."""
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in _LIBC]
    named = [part for platform in ("manylinux2014_aarch64", *platforms) for part in ("--platform", platform)]
    options = ["--implementation", "cp", "--python-version", _PYTHON, "--only-binary", ":all:"]
    return ["--target", str(folder / "site"), *options, *named]


def _private(folder: Path) -> Sequence[str]:
    """Return options of apt-get for lists of its own, for the other processor."""
    chosen = {
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "APT::Architecture": _DEBIAN,
        "APT::Architectures": _DEBIAN,
        "Acquire::Languages": "none",
    }
    return [part for name, value in chosen.items() for part in ("-o", f"{name}={value}")]


def _describe(system: Path, cpu: str) -> None:
    """Write what Linux says of the processor: without it libraries read the description of this machine's."""
    features = _FEATURES + (_DOT_PRODUCTS if cpu == "cortex-a76" else "")
    core = (
        "processor\t: {}\nBogoMIPS\t: 108.00\nFeatures\t: {}\nCPU implementer\t: 0x41\nCPU architecture: 8\n"
        "CPU variant\t: 0x0\nCPU part\t: {}\nCPU revision\t: 3\n\n"
    )
    (system / "proc").mkdir()
    described = "".join(core.format(number, features, PARTS[cpu]) for number in range(_CORES))
    (system / "proc" / "cpuinfo").write_text(described, encoding="ascii")
    cores = system / "sys" / "devices" / "system" / "cpu"
    every = f"0-{_CORES - 1}\n"
    cores.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (cores / name).write_text(every, encoding="ascii")
    for number in range(_CORES):
        topology = cores / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (cores / f"cpu{number}" / "cpufreq").mkdir()
        (cores / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq").write_text("1500000\n", encoding="ascii")
        (topology / "physical_package_id").write_text("0\n", encoding="ascii")
        (topology / "core_id").write_text(f"{number}\n", encoding="ascii")
        (topology / "core_siblings_list").write_text(every, encoding="ascii")
        (topology / "package_cpus_list").write_text(every, encoding="ascii")
        (topology / "thread_siblings_list").write_text(f"{number}\n", encoding="ascii")
