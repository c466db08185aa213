"""Keeps answers to requests that come again: the same bytes to the same bundle get the same answer."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from kedge_agent.serving.handler import Request, Response

_OVERHEAD = 512
"""Bytes that an entry takes besides its body, about."""
_FIELDS = ("content-type", "inference-header-content-length")
"""Header fields on which an answer depends."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A kept answer and the number of its samples."""

    response: Response
    samples: int


class AnswerCache:
    """The answers of all models of a process, the ones that were not asked for longest dropped first. Any thread may
    use it.

    Args:
        limit: bytes of all answers together.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._kept: OrderedDict[bytes, Kept] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    @staticmethod
    def key(digest: str, request: Request) -> bytes:
        """Return the key of a request: a digest of the bundle's digest, the route, and what was sent.

        Args:
            digest: the digest of the bundle that answers.
        """
        hashed = hashlib.blake2b(request.body, digest_size=20)
        fields = (request.fields.get(name, "") for name in _FIELDS)
        hashed.update("\0".join((digest, request.path.rpartition("/")[2], request.query, *fields)).encode())
        return hashed.digest()

    @staticmethod
    def key_of_message(digest: str, message: bytes) -> bytes:
        """Return the key of a gRPC request.

        Args:
            digest: the digest of the bundle that answers.
            message: the request, without its id.
        """
        hashed = hashlib.blake2b(message, digest_size=20)
        hashed.update(f"\0grpc\0{digest}".encode())
        return hashed.digest()

    def get(self, key: bytes) -> Kept | None:
        """Return the answer to a request, or None."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def put(self, key: bytes, response: Response, samples: int) -> None:
        """Keep an answer, unless it is no success or would take more than a quarter of the space."""
        size = _size(response)
        if response.status != 200 or response.stream is not None or size > self._limit // 4:
            return
        with self._lock:
            old = self._kept.pop(key, None)
            self._size += size - (0 if old is None else _size(old.response))
            self._kept[key] = Kept(response, samples)
            while self._size > self._limit:
                _, dropped = self._kept.popitem(last=False)
                self._size -= _size(dropped.response)


def _size(response: Response) -> int:
    body = response.body
    return _OVERHEAD + (len(body) if isinstance(body, bytes) else sum(memoryview(part).nbytes for part in body))
