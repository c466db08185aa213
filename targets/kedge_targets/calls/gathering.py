"""Calls that come while others run wait, and then run together: one call of the runtime with the samples of several.

Nobody waits for calls that might come: what gathers is what came while the calls before ran. Calls of different sizes
are never put into one. If a call of several fails, each of them runs again by itself, so that the mistake in one is the
error of that one alone.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt

from kedge_targets.calls.plan import Gathered

Array = npt.NDArray[Any]
Run = Callable[[list[Array]], list[Array]]


class _Call:
    """One call that waits or runs.

    Attributes:
        key: of calls that may run together; None for one that runs by itself.
        rows: its number of samples; ``most``: how many may be in one call.
        turn: held until the call is answered, or its thread is to run a group.
        group: the calls that this one's thread is to run.
    """

    __slots__ = ("arrays", "error", "group", "key", "most", "result", "rows", "turn")

    def __init__(self, arrays: list[Array], key: object, rows: int, most: int) -> None:
        self.arrays = arrays
        self.key = key
        self.rows = rows
        self.most = most
        self.turn = threading.Lock()
        self.turn.acquire()
        self.group: list[_Call] = []
        self.result: list[Array] | None = None
        self.error: BaseException | None = None


class Gathering:
    """Runs the calls of one session; any thread may call it.

    Args:
        run: the session's, safe for ``at_once`` threads.
        axes_in, axes_out: the batch axis of each array of the file.
        gathered: see :class:`~kedge_targets.calls.plan.CallPlan`.
        at_once: calls of ``run`` at the same time.
    """

    def __init__(
        self,
        run: Run,
        *,
        axes_in: Sequence[int],
        axes_out: Sequence[int],
        gathered: Sequence[Gathered],
        at_once: int,
    ) -> None:
        self._run = run
        self._axes_in = list(axes_in)
        self._axes_out = list(axes_out)
        self._limits = [(one.values, one.most) for one in gathered]
        self._at_once = at_once
        self._running = 0
        self._waiting: deque[_Call] = deque()
        self._lock = threading.Lock()
        self._sizes: dict[int, tuple[int, int]] = {}

    @property
    def sizes(self) -> dict[int, tuple[int, int]]:
        """Return number of samples → how many calls of the runtime had so many, and their nanoseconds together."""
        with self._lock:
            return dict(self._sizes)

    def __call__(self, arrays: list[Array]) -> list[Array]:
        """Run one call, alone or together with others."""
        call = self._call(arrays)
        with self._lock:
            waits = self._running >= self._at_once
            if waits:
                self._waiting.append(call)
            else:
                self._running += 1
        if waits:
            call.turn.acquire()
        else:
            call.group = [call]
        if call.group:
            self._lead(call.group)
        if call.error is not None:
            raise call.error
        if call.result is None:
            raise RuntimeError("a call was left without an answer")
        return call.result

    def _call(self, arrays: list[Array]) -> _Call:
        rows = arrays[0].shape[self._axes_in[0]]
        values = sum(array.size for array in arrays) // max(rows, 1)
        most = next((most for limit, most in self._limits if values <= limit), 1)
        if most < 2 or rows >= most:
            return _Call(arrays, None, rows, rows)
        shapes = ((*a.shape[:axis], *a.shape[axis + 1 :]) for a, axis in zip(arrays, self._axes_in, strict=True))
        return _Call(arrays, tuple(shapes), rows, most)

    def _lead(self, group: list[_Call]) -> None:
        """Run a group in this thread, answer its calls, and let a waiting thread go on with the next."""
        try:
            self._answer(group)
        except BaseException as error:
            for call in group:
                if call.result is None and call.error is None:
                    call.error = error
            if not isinstance(error, Exception):
                raise
        finally:
            with self._lock:
                follower = self._next()
            for call in group[1:]:
                call.turn.release()
            if follower is not None:
                follower.turn.release()

    def _next(self) -> _Call | None:
        """Return the call whose thread runs the next group, which it is given; the caller holds the lock."""
        if not self._waiting:
            self._running -= 1
            return None
        first = self._waiting.popleft()
        first.group = [first]
        if first.key is not None:
            rows, left = first.rows, deque[_Call]()
            for call in self._waiting:
                if call.key == first.key and rows + call.rows <= first.most:
                    first.group.append(call)
                    rows += call.rows
                else:
                    left.append(call)
            self._waiting = left
        return first

    def _answer(self, group: list[_Call]) -> None:
        if len(group) > 1:
            try:
                self._together(group)
                return
            except Exception:  # noqa: BLE001 -- whatever a runtime may raise
                # One of them may be to blame; each gets its own error, or its answer.
                for call in group:
                    call.result = None
        for call in group:
            try:
                call.result = self._timed(call.arrays, call.rows)
            except Exception as error:  # noqa: BLE001 -- raised again in the call's own thread
                call.error = error

    def _together(self, group: list[_Call]) -> None:
        columns = zip(*(call.arrays for call in group), strict=True)
        arrays = [
            np.concatenate(column, axis=axis, dtype=column[0].dtype, casting="no")
            for column, axis in zip(columns, self._axes_in, strict=True)
        ]
        results = self._timed(arrays, sum(call.rows for call in group))
        at = 0
        for call in group:
            call.result = [
                result[(slice(None),) * axis + (slice(at, at + call.rows),)]
                for result, axis in zip(results, self._axes_out, strict=True)
            ]
            at += call.rows
        whole = all(result.shape[axis] == at for result, axis in zip(results, self._axes_out, strict=True))
        if not whole:
            raise ValueError("the runtime's answer has another number of samples")

    def _timed(self, arrays: list[Array], rows: int) -> list[Array]:
        begun = perf_counter_ns()
        results = self._run(arrays)
        took = perf_counter_ns() - begun
        with self._lock:
            count, sum_so_far = self._sizes.get(rows, (0, 0))
            if count or len(self._sizes) < 256:
                self._sizes[rows] = count + 1, sum_so_far + took
        return results
