"""Kits for tests: certificates, a kit unpacked and installed into the root of an empty system."""

from __future__ import annotations

import datetime
import shutil
import subprocess
import tarfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from kedge.fleet.kit import KitOptions, write

PASSWORD = 'a "secret" \\ of d1'
_UNITS = Path("/usr/lib/systemd/system")
_EXECUTABLES = ("opt/kedge/bin/kedge-agent", "usr/bin/nvidia-modprobe")


def authority() -> bytes:
    """A certificate authority of its own, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    start = datetime.datetime(2026, 1, 1)
    builder = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=9000))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_kit(folder: Path, target: str, name: str = "d1") -> Path:
    """A kit with TLS and a password."""
    (folder / "authority.pem").write_bytes(authority())
    (folder / "pw").write_text(f"{PASSWORD}\n")
    kit = folder / f"{name}-{target}.tar.gz"
    options = KitOptions(
        kit=kit, broker="mqtts://broker.test:8884", ca=folder / "authority.pem", password_file=folder / "pw"
    )
    write(name, target, options)
    return kit


def unpack(kit: Path, folder: Path) -> Path:
    """Unpack as the board does."""
    folder.mkdir()
    with tarfile.open(kit) as tar:
        tar.extractall(folder, filter="data")
    return folder


def empty_system(root: Path) -> Path:
    """The root of a system that holds systemd's own targets and the programs that the units start, and nothing else."""
    units = root / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for path in _UNITS.glob("*.target"):
        shutil.copy(path, units / path.name, follow_symlinks=True)
    for name in _EXECUTABLES:
        program = root / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    return root


def install(unpacked: Path, root: Path) -> subprocess.CompletedProcess[str]:
    """Run the kit's own ``install.sh`` into a root."""
    command = ["sh", str(unpacked / "install.sh"), "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
