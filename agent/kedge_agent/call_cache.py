"""Keeps answers of :class:`kedge_agent.Model` to calls that come again with the same input."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from kedge_agent.loaded import Loaded

_OVERHEAD = 512
"""Bytes that an entry takes besides its arrays, about."""
_MOST_FILE_BYTES = 64 << 20


class CallCache:
    """The answers of one model, the ones that were not asked for longest dropped first. Any thread may use it.

    Args:
        limit: bytes of all answers together.

    Attributes:
        hits, misses: numbers of calls whose answer was kept, or was not.
    """

    def __init__(self, limit: int) -> None:
        self.hits = 0
        self.misses = 0
        self._limit = limit
        self._size = 0
        self._kept: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def around(self, loaded: Loaded) -> Loaded:
        """Let a bundle's calls look here first."""
        run = loaded.call

        def call(loaded: Loaded, given: Any, named: Mapping[str, Any]) -> Any:
            return self.answer(_key(loaded.digest, given, named), lambda: run(loaded, given, named))

        loaded.call = call
        return loaded

    def piped(self, loaded: Loaded, item: Any, run: Callable[[], Any]) -> Any:
        """Return a pipeline's answer: the kept one, or that of ``run``. Pipelines that go on to other models are not
        kept, since their answers depend on those."""
        declared = None if loaded.pipeline is None else loaded.pipeline.pipeline
        if declared is None or declared.then is not None or declared.cascade is not None:
            return run()
        content = item if declared.text is not None else _content(item)
        return self.answer(_key(f"{loaded.digest} pipeline", content, {}), run)

    def answer(self, key: bytes | None, run: Callable[[], Any]) -> Any:
        """Return the answer that was kept, or run and keep its answer.

        Args:
            key: None for a call that is not kept.
        """
        if key is None:
            return run()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                self.hits += 1
        if found is not None:
            return copy.deepcopy(found[0])  # the caller may write into it
        result = run()
        self._put(key, copy.deepcopy(result))
        return result

    def _put(self, key: bytes, result: Any) -> None:
        size = _OVERHEAD + _bytes_of(result)
        with self._lock:
            self.misses += 1
            if size > self._limit // 4:
                return
            _, old = self._kept.pop(key, (None, 0))
            self._kept[key] = result, size
            self._size += size - old
            while self._size > self._limit:
                _, (_, dropped) = self._kept.popitem(last=False)
                self._size -= dropped


def _key(digest: str, given: Any, named: Mapping[str, Any]) -> bytes | None:
    """Return the key of a call; None if it holds anything but arrays, bytes, texts and numbers."""
    hashed = hashlib.blake2b(digest.encode(), digest_size=20)
    return hashed.digest() if _add(hashed, given) and _add(hashed, named) else None


def _add(hashed: Any, value: Any) -> bool:
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        hashed.update(f"\0array {value.dtype.str} {value.shape}\0".encode())
        hashed.update(np.ascontiguousarray(value).data)
        return True
    if isinstance(value, (bytes, str)):
        raw = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
        hashed.update(f"\0{type(value).__name__} {len(raw)}\0".encode())
        hashed.update(raw)
        return True
    if isinstance(value, Mapping):
        hashed.update(f"\0mapping {len(value)}\0".encode())
        return all(isinstance(name, str) and _add(hashed, name) and _add(hashed, one) for name, one in value.items())
    if isinstance(value, (list, tuple)):
        hashed.update(f"\0{type(value).__name__} {len(value)}\0".encode())
        return all(_add(hashed, one) for one in value)
    if value is None or isinstance(value, (bool, int, float)):
        hashed.update(f"\0{value!r}\0".encode())
        return True
    return False


def _content(item: Any) -> Any:
    """Return a file's bytes for its path, since a file may change; of a list, those of each."""
    if isinstance(item, list):
        return [_content(one) for one in item]
    if not isinstance(item, (str, os.PathLike)):
        return item
    try:
        path = Path(item)
        return path.read_bytes() if path.stat().st_size <= _MOST_FILE_BYTES else path
    except OSError:
        return Path(item)  # the pipeline says what is wrong with it


def _bytes_of(result: Any) -> int:
    if isinstance(result, np.ndarray):
        return int(result.nbytes)
    if isinstance(result, Mapping):
        return sum(_bytes_of(one) for one in result.values())
    if isinstance(result, (list, tuple)):
        return sum(_bytes_of(one) for one in result)
    held = getattr(result, "__dict__", None)
    return 64 + (_bytes_of(held) if held else len(result) if isinstance(result, str) else 0)
