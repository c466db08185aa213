"""Errors travel between processes as they are."""

from __future__ import annotations

import copy
import pickle

import pytest

from kedge_protocol import errors
from kedge_protocol.errors import KedgeError


def every(kind: type[KedgeError]) -> list[type[KedgeError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in every(child))]


@pytest.mark.parametrize("kind", [one for one in every(KedgeError) if one.__module__ == errors.__name__])
@pytest.mark.parametrize("more", [{}, {"where": "model.onnx", "remedy": "Give another"}])
def test_an_error_is_the_same_after_pickling_and_copying(kind: type[KedgeError], more: dict[str, str]) -> None:
    error = kind("is broken", **more)
    error.told = "on the way"  # type: ignore[attr-defined] # what notes and attributes of subclasses are
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


class RefusedError(KedgeError):
    """One whose constructor takes something else."""

    def __init__(self, count: int) -> None:
        super().__init__(f"{count} were refused")
        self.count = count


def test_a_subclass_with_a_constructor_of_its_own_is_pickled_too() -> None:
    again = pickle.loads(pickle.dumps(RefusedError(3)))
    assert (type(again), again.count, str(again)) == (RefusedError, 3, "3 were refused")
