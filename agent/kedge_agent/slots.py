"""The folder of one model on the device: its slots, the current one, and how it is switched.

::

    STATE/models/NAME/slots/HEX16/   files by title, manifest.json, config.json; never changed once there
    STATE/models/NAME/current        symbolic link to the slot that serves
    STATE/models/NAME/previous       the one before it, kept for a roll-back
    STATE/models/NAME/generation     8 bytes, little-endian; grows after each switch; written in place, so that
                                     applications that mapped it see it
    STATE/models/NAME/serving.json   what the serving process has loaded
    STATE/models/NAME/gives-way      while memory has no room for two versions: the one that the serving process lets go
    STATE/models/NAME/counters/      one file a process, see :mod:`kedge_agent.counters`
    STATE/models/NAME/first-tokens/  one file a process, and
    STATE/models/NAME/token-times/   another one, see :mod:`kedge_agent.paces`
    STATE/models/NAME/sketches/      one file a process, see :mod:`kedge_agent.sketches`
    STATE/models/NAME/shadow.sock    where a shadow listens while it runs, see :mod:`kedge_agent.shadow`
    STATE/models/NAME/CHOICE.sock    where the agent listens while it collects samples, see :mod:`kedge_agent.samples`

The agent writes; applications and the serving process read. A reader reads :meth:`ModelFolder.generation` first and
:meth:`ModelFolder.current` after it; when the generation changes, it reads both again. It may keep a slot's files open:
removing a slot removes only their names.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from kedge_agent.files import replace_link, storage_errors
from kedge_protocol import codec, digest, files, folders
from kedge_protocol.bundle.layout import Bundle, parse_bundle
from kedge_protocol.errors import BundleError, MessageError
from kedge_protocol.samples import Choice
from kedge_protocol.topics import checked_name

MANIFEST_FILE = "manifest.json"
FORMAT_1_MANIFEST = "bundle.json"
"""The manifest's name in state folders of format 1, see :mod:`kedge_agent.state_format`."""
CONFIG_FILE = "config.json"
VERSIONS = "versions"
SYSTEM_STATE = Path("/var/lib/kedge")

_GENERATION = struct.Struct("<Q")


def default_state() -> Path:
    """Return the default state folder: ``KEDGE_STATE``, else the system's if it exists, else the user's."""
    given = os.environ.get("KEDGE_STATE")
    if given:
        return Path(given)
    if SYSTEM_STATE.is_dir():
        return SYSTEM_STATE
    return folders.user_folder("XDG_STATE_HOME", ".local/state")


def model_names(state: Path) -> list[str]:
    """Return the names of the models with a current slot, sorted."""
    return sorted(path.parent.name for path in (state / "models").glob("*/current"))


def further_states(state: Path) -> list[Path]:
    """Return the state folders of further versions: ``kedge-agent serve`` may hold several versions of a model, an
    agent's state folder holds one."""
    return sorted((state / VERSIONS).glob("*"))


def model_folders(state: Path) -> list[ModelFolder]:
    """Return the folder of every model that is or was on the device, sorted by name."""
    found = sorted(path.parent.name for path in (state / "models").glob("*/generation"))
    return [ModelFolder(state, name) for name in found]


def check_titles(bundle: Bundle) -> None:
    """Raise :class:`BundleError` if a layer has a name that slots keep for themselves."""
    for reserved in (MANIFEST_FILE, FORMAT_1_MANIFEST, CONFIG_FILE):
        if reserved in bundle.files:
            raise BundleError(f"a layer is named {reserved!r}, a name that slots keep for themselves")


def _manifest(folder: Path) -> bytes:
    """Read the manifest of a slot. The older name comes first: no newer slot has a file of that name."""
    try:
        return (folder / FORMAT_1_MANIFEST).read_bytes()
    except FileNotFoundError:
        return (folder / MANIFEST_FILE).read_bytes()


@dataclass(frozen=True)
class Slot:
    """A slot: one bundle, ready to be loaded.

    Attributes:
        folder: the real path (not a link), with the bundle's files by title.
        digest: digest of the bundle's manifest.
    """

    folder: Path
    digest: str

    def bundle(self) -> Bundle:
        """Read the bundle's manifest and configuration.

        Raises:
            BundleError: the slot's files are damaged.
            FileNotFoundError: the slot was removed meanwhile; read the current one again.
        """
        return parse_bundle(
            _manifest(self.folder),
            (self.folder / CONFIG_FILE).read_bytes(),
            where=str(self.folder),
        )


@dataclass(frozen=True, kw_only=True)
class Serving:
    """``serving.json``: what the serving process has loaded of a model, written after each attempt to load.

    Attributes:
        digest: digest of the bundle that was loaded or failed to load.
        pid: process id of the serving process.
        error: why the bundle does not serve; None if it does.
        detail: description of what runs the bundle; None if the runtime's name says it all.
        figures: figures that the runtime measured on this device (a board's throughput), by name with unit.
    """

    digest: str
    pid: int
    error: str | None = None
    detail: str | None = None
    figures: dict[str, float] = field(default_factory=dict)


class ModelFolder:
    """One model's folder.

    Args:
        state: the agent's state folder.
        name: name of the model.

    Raises:
        ConfigError: ``name`` is not valid for a model.
    """

    def __init__(self, state: Path, name: str) -> None:
        self.name = checked_name(name, "model name")
        self._state = state
        self.path = state / "models" / name
        self.slots = self.path / "slots"
        self.counters = self.path / "counters"
        self.sketches = self.path / "sketches"
        self.first_tokens = self.path / "first-tokens"
        self.token_times = self.path / "token-times"
        self.generation_file = self.path / "generation"
        self.shadow_socket = self.path / "shadow.sock"
        self.serving_file = self.path / "serving.json"
        self._gives_way = self.path / "gives-way"

    def sample_socket(self, choice: Choice) -> Path:
        """Return where samples are taken while some are collected."""
        return self.path / f"{choice.value}.sock"

    def forget_running(self) -> None:
        """Remove what an agent that was killed left: sockets of shadows and samples, to which calls are shown while
        they are there, and a version's order to make way."""
        for path in (self.shadow_socket, *map(self.sample_socket, Choice), self._gives_way):
            with contextlib.suppress(OSError):
                path.unlink()

    # Reading: by anybody.

    @property
    def state(self) -> Path:
        """Return the agent's state folder."""
        return self._state

    @property
    def cache(self) -> Path | None:
        """Return the folder for files that backends build on this device, for the state's owner; None for other users,
        who have their own: nobody runs what another user could have built."""
        try:
            return self._state / "cache" if self._state.stat().st_uid == os.geteuid() else None
        except OSError:
            return None

    def current(self) -> Slot | None:
        """Return the current slot, or None."""
        return self._linked("current")

    def previous(self) -> Slot | None:
        """Return the slot kept for a rollback, or None."""
        return self._linked("previous")

    def slot(self, bundle: str) -> Slot:
        """Return the slot for a bundle's digest, which may not exist."""
        return Slot(self.slots / digest.hex_of(bundle)[:16], bundle)

    def generation(self) -> int:
        """Return how often the model was switched."""
        try:
            raw = self.generation_file.read_bytes()
        except FileNotFoundError:
            return 0
        return int(_GENERATION.unpack(raw)[0]) if len(raw) == _GENERATION.size else 0

    def serving(self) -> Serving | None:
        """Return what the serving process reports about this model; None if nothing yet."""
        try:
            return codec.decode(self.serving_file.read_bytes(), Serving, where=str(self.serving_file))
        except (OSError, MessageError):
            return None

    def gives_way(self, bundle: str) -> bool:
        """Return whether the serving process must let go of a bundle (its digest), see :mod:`kedge_agent.room`."""
        try:
            return self._gives_way.read_text(encoding="ascii") == bundle
        except OSError:
            return False

    def _linked(self, link: str) -> Slot | None:
        try:
            folder = self.slots / (self.path / link).readlink().name
            return Slot(folder, digest.of_bytes(_manifest(folder)))
        except OSError:
            return None

    # Writing: the agent alone (serving.json: the serving child alone).

    def write_serving(self, serving: Serving) -> None:
        """Write what is loaded; called by the serving process."""
        with storage_errors(self.serving_file):
            files.write(self.serving_file, codec.encode(serving))

    def give_way(self, bundle: str) -> None:
        """Make the serving process let go of a bundle, if that is the current one."""
        with storage_errors(self._gives_way):
            files.write(self._gives_way, bundle.encode("ascii"))

    def take_back(self) -> None:
        """Let the serving process have the current bundle again."""
        with storage_errors(self._gives_way):
            self._gives_way.unlink(missing_ok=True)

    def assemble(self, bundle: Bundle, blob: Callable[[str], Path]) -> Slot:
        """Create the bundle's slot, completely or not at all. It is not current yet.

        Args:
            bundle: the checked bundle.
            blob: digest → path of the checked blob; blobs are linked, not copied.

        Raises:
            BundleError: a layer has a name that is reserved for the slot.
            StorageError: the disk is full or not writable.
        """
        check_titles(bundle)
        made = self.slot(bundle.digest)
        folder = made.folder
        with storage_errors(folder):
            self._prepare()
            if self._is_whole(made, bundle):
                return made
            staging = Path(tempfile.mkdtemp(prefix=".new.", dir=self.slots))
            try:
                staging.chmod(0o755)
                for title, layer in bundle.files.items():
                    os.link(blob(layer.digest), staging / title)
                files.write(staging / MANIFEST_FILE, bundle.raw)
                files.write(staging / CONFIG_FILE, bundle.config_raw)
                if folder.exists():
                    shutil.rmtree(folder)
                staging.rename(folder)
            except BaseException:
                shutil.rmtree(staging, ignore_errors=True)
                raise
            files.flush(self.slots)
        return made

    def switch(self, slot: Slot) -> None:
        """Make a slot current; the one before becomes the previous slot. Nothing happens if it is already current.

        Raises:
            StorageError: the disk is full or not writable; the old slot is still current.
        """
        before = self.current()
        if before is not None and before.digest == slot.digest:
            return
        with storage_errors(self.path):
            if before is not None:
                replace_link(self.path / "previous", f"slots/{before.folder.name}")
            replace_link(self.path / "current", f"slots/{slot.folder.name}")
            self.bump()

    def roll_back(self) -> Slot | None:
        """Make the previous slot current again and drop the current one. Return None if there is no previous slot; then
        nothing serves."""
        before = self.previous()
        if before is None:
            self.remove()
            return None
        with storage_errors(self.path):
            replace_link(self.path / "current", f"slots/{before.folder.name}")
            (self.path / "previous").unlink()
            self.bump()
        self.prune()
        return before

    def remove(self) -> None:
        """Remove the model from the device. The generation and the counters stay, since applications watch them."""
        with storage_errors(self.path):
            for link in ("current", "previous"):
                with contextlib.suppress(FileNotFoundError):
                    (self.path / link).unlink()
            with contextlib.suppress(FileNotFoundError):
                self.serving_file.unlink()
            if self.path.is_dir():
                self.bump()
        self.prune()

    def prune(self, keep: Iterable[str] = ()) -> None:
        """Remove every slot except the current, the previous and those of the bundles in ``keep`` (digests), and
        remains of a crash."""
        kept = {self.slot(bundle).folder.name for bundle in keep}
        kept |= {slot.folder.name for slot in (self.current(), self.previous()) if slot is not None}
        if self.slots.is_dir():
            for folder in self.slots.iterdir():
                if folder.name not in kept:
                    shutil.rmtree(folder, ignore_errors=True)

    def bump(self) -> None:
        """Increase the generation in place. The agent also does it at its start, since a crash may have come between a
        switch and this."""
        raw = _GENERATION.pack(self.generation() + 1)
        handle = os.open(self.generation_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            os.pwrite(handle, raw, 0)
            os.fsync(handle)
        finally:
            os.close(handle)

    def _prepare(self) -> None:
        self.slots.mkdir(parents=True, exist_ok=True)
        # Applications of any user count here; none may remove the file of another.
        for counted in (self.counters, self.sketches, self.first_tokens, self.token_times):
            counted.mkdir(exist_ok=True)
            counted.chmod(0o1777)
        if not self.generation_file.exists():
            self.bump()

    @staticmethod
    def _is_whole(slot: Slot, bundle: Bundle) -> bool:
        try:
            same = slot.bundle().digest == bundle.digest
        except (OSError, BundleError):
            return False
        return same and all((slot.folder / title).is_file() for title in bundle.files)
