"""The arguments of ``kedge.compile`` are the options of the command line, in Python's own types."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import kedge
from kedge.compiler import arguments
from kedge.search.effort import Effort
from kedge.search.options import CompileOptions
from kedge_protocol.errors import ConfigError

LEAST = {"name": "n", "version": "1", "targets": "rpi4", "calibration": "c.npz", "evaluation": Path("e"), "out": "O"}


def test_types_and_options_name_the_same_arguments() -> None:
    typed = {**arguments.RequiredArguments.__annotations__, **arguments.CompileArguments.__annotations__}
    found = inspect.signature(kedge.compile).parameters
    assert set(found) == {"model", "progress", *typed}
    least = {name for name, one in found.items() if one.default is inspect.Parameter.empty}
    assert least == {"model", *arguments.RequiredArguments.__annotations__} == {"model", *LEAST}
    assert found["effort"].default == "normal"
    for name in typed:
        assert f"\n        {name}: " in str(kedge.compile.__doc__)


def test_values_may_come_in_the_types_of_python() -> None:
    made = arguments.to_options(
        {
            **LEAST,
            "effort": "high",
            "max_size": 2000,
            "step": "distil",
            "preprocess": None,
            "recipe": "r.toml",
            "batch_axes": {"state": 1, "sr": None},
            "states": {"h_in": "h_out"},
            "force": True,
        }
    )
    assert made == CompileOptions(
        name="n",
        version="1",
        targets=("rpi4",),
        calibration=Path("c.npz"),
        evaluation=Path("e"),
        out=Path("O"),
        effort=Effort.HIGH,
        max_size="2000",
        step=("distil",),
        recipe=Path("r.toml"),
        batch_axis=("state=1", "sr=none"),
        state=("h_in=h_out",),
        force=True,
    )


@pytest.mark.parametrize(
    ("given", "language_model"),
    [
        ({"context": 64}, False),
        ({"cache": "int8"}, False),
        ({"max_drop": 0.02}, True),
        ({"metric": "top1"}, True),
        ({"states": {"h_in": "h_out"}}, True),
    ],
)
def test_an_option_that_the_kind_of_model_does_not_take_is_refused(
    given: dict[str, object], language_model: bool
) -> None:
    made = arguments.to_options({**LEAST, **given})
    (name,) = given
    made.check_kind(language_model=not language_model)
    with pytest.raises(ConfigError, match=f"--{name.rstrip('s').replace('_', '-')}: is .*for language models"):
        made.check_kind(language_model=language_model)


def test_an_unknown_effort_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="quick, normal, high"):
        arguments.to_options({**LEAST, "effort": "some"})


def test_a_wrong_name_is_an_error_before_anything_begins() -> None:
    with pytest.raises(TypeError, match="max_dorp"):
        kedge.compile("m.onnx", **LEAST, max_dorp=0.1)  # type: ignore[call-arg,arg-type]
