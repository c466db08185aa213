"""Sources of frames: a folder of pictures, a video file, a camera, a network stream.

A folder needs only Pillow; everything else is read by PyAV (the agent's extra ``video``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kedge_protocol.errors import InputError, MissingDependencyError
from kedge_protocol.packages import AGENT, pip_install

SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".webp"})
_SCHEMES = ("rtsp://", "rtsps://", "rtmp://", "http://", "https://", "udp://", "srt://")
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        number: counted from 0, dropped ones included.
        name: the picture's file name; empty for a video.
        item: what a pipeline takes: a path, or uint8 height x width x 3 (RGB).
    """

    number: int
    name: str
    item: Any


class Source(Protocol):
    """Gives frames one after another.

    Attributes:
        live: whether frames come by themselves, as from a camera: those that nobody takes are lost.
        rate: frames a second at which it was recorded; None if unknown.
    """

    live: bool
    rate: float | None

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame]:
        """Yield the frames until the end, or until ``stopped`` returns True.

        Raises:
            InputError: the source cannot be read.
        """
        ...


def open_source(source: str, *, follow: bool = False) -> Source:
    """Open a source.

    Args:
        source: a folder of pictures, a video file, ``/dev/video0``, or a URL (``rtsp://…``).
        follow: for a folder: wait for more pictures instead of ending.

    Raises:
        InputError: there is no such source, or PyAV cannot read it.
        MissingDependencyError: PyAV is not installed.
    """
    path = Path(source)
    if path.is_dir():
        return PictureFolder(path, follow=follow)
    if follow:
        raise InputError("only a folder can be followed", where=source, remedy="Leave out --follow")
    if not source.startswith(_SCHEMES) and not path.exists():
        raise InputError(
            "there is no such folder, file or device",
            where=source,
            remedy="Give a folder of pictures, a video file, /dev/video0 or rtsp://...",
        )
    return Video(source)


class PictureFolder:
    """The pictures of a folder in the order of their names; hidden files and those of other kinds are passed over."""

    live = False
    rate: float | None = None

    def __init__(self, path: Path, *, follow: bool) -> None:
        self._path = path
        self._follow = follow

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame]:
        """See :meth:`Source.frames`."""
        taken: dict[str, None] = {}
        sizes: dict[str, int] = {}
        found = self._look()
        if not found and not self._follow:
            raise InputError(
                "holds no picture", where=str(self._path), remedy=f"Known are {', '.join(sorted(SUFFIXES))}"
            )
        first = True
        while not stopped():
            for name, size in found.items():
                # A new picture is whole once it no longer grows.
                if name in taken or not (first or sizes.get(name) == size):
                    continue
                taken[name] = None
                yield Frame(len(taken) - 1, name, self._path / name)
                if stopped():
                    return
            if not self._follow:
                return
            first, sizes = False, found
            time.sleep(_POLL_SECONDS)
            found = self._look()

    def _look(self) -> dict[str, int]:
        try:
            entries = [one for one in self._path.iterdir() if one.suffix.lower() in SUFFIXES]
            return {one.name: one.stat().st_size for one in sorted(entries) if not one.name.startswith(".")}
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}", where=str(self._path)) from error


class Video:
    """A video file, a camera or a network stream, read by PyAV."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._av = _library()
        self.live = source.startswith("/dev/") or source.startswith(_SCHEMES)
        self._container = self._open()
        if not self._container.streams.video:
            raise InputError("holds no video", where=source)
        rate = self._container.streams.video[0].average_rate
        self.rate: float | None = float(rate) if rate else None

    def frames(self, stopped: Callable[[], bool]) -> Iterator[Frame]:
        """See :meth:`Source.frames`."""
        try:
            for number, frame in enumerate(self._container.decode(video=0)):
                if stopped():
                    return
                yield Frame(number, "", frame.to_ndarray(format="rgb24"))
        except self._av.FFmpegError as error:
            raise InputError(f"cannot be read on: {error}", where=self._source) from error
        finally:
            self._container.close()

    def _open(self) -> Any:
        options = {"rtsp_transport": "tcp"} if self._source.startswith("rtsp") else {}
        kind = "v4l2" if self._source.startswith("/dev/") else None
        try:
            return self._av.open(self._source, format=kind, options=options, timeout=10.0)
        except (self._av.FFmpegError, OSError, ValueError) as error:
            raise InputError(f"cannot be opened: {error}", where=self._source) from error


def _library() -> Any:
    try:
        import av
    except ImportError as error:
        raise MissingDependencyError(
            "videos and cameras are read by PyAV, which is not installed",
            remedy=f"Install it: {pip_install('video', of=AGENT)}; a folder of pictures needs only Pillow",
        ) from error
    return av
