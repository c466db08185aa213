"""The arguments of ``kedge.compile`` are the options of the command line, in Python's own types."""

from __future__ import annotations

import inspect
import math
import re
import typing
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kedge
from kedge.compiler import arguments
from kedge.search import option_ranges
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


ODD: tuple[Any, ...] = (
    None, "", "0.5", "7", "yes", b"7", 0, 7, -1, 10**400, 0.5, 7.0, math.nan, math.inf, 1j, True, False,
    np.float32(0.5), np.int64(7), np.True_, np.array([0.5, 7]), [], [7], ["a", 7], {}, {"a": 1.5}, {7: 7}, ("a", "b"),
    {"a"}, len, object(), Path("p"), Decimal("0.5"),
)  # fmt: skip
"""Values of all types, of which each option takes a few."""


def taken(hint: Any, value: Any) -> bool:
    """Whether a value is of the type that an option's field declares."""
    if typing.get_origin(hint) is tuple:
        return type(value) is tuple and all(type(one) is str for one in value)
    kinds = [one for one in typing.get_args(hint) or (hint,) if isinstance(one, type)]
    return any(type(value) is one or (one is Path and isinstance(value, Path)) for one in kinds)


@pytest.mark.parametrize("name", [parameter.name for parameter in arguments.parameters()])
def test_an_option_takes_what_its_type_is_and_refuses_all_else_by_name(name: str) -> None:
    field = {"batch_axes": "batch_axis", "states": "state"}.get(name, name)
    hint = typing.get_type_hints(CompileOptions)[field]
    refused: list[ConfigError] = []
    for value in ODD:
        try:
            made = arguments.to_options({**LEAST, name: value})
        except ConfigError as error:
            refused.append(error)
        else:
            assert taken(hint, getattr(made, field)), value
    assert {(error.where, bool(error.remedy)) for error in refused} == {(name, True)}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_kl": "0.5"}, "max_kl: '0.5' is no number. Give a float or an int, a text is not read as one"),
        ({"context": 64.0}, "context: 64.0 is no whole number. Give an int, a text is not read as one"),
        ({"slots": True}, "slots: True is no whole number. Give an int, a text is not read as one"),
        ({"force": "no"}, "force: 'no' is no truth value. Give True or False"),
        ({"calibration": 7}, "calibration: 7 is no path. Give a str or a pathlib.Path"),
        ({"targets": 7}, "targets: 7 is no text, nor several. Give a str or a list of them"),
    ],
)
def test_a_value_of_another_type_is_refused_with_the_type_wanted(given: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        kedge.compile("m.onnx", **{**LEAST, **given})  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    made = arguments.to_options({**LEAST, "max_drop": np.float64(0.5), "jobs": np.int32(2), "force": np.True_})
    assert (made.max_drop, made.jobs, made.force) == (0.5, 2, True)
    assert (type(made.max_drop), type(made.jobs), type(made.force)) == (float, int, bool)


def test_each_number_has_a_range_and_its_refusal_names_the_option() -> None:
    hints = typing.get_type_hints(CompileOptions)
    numeric = {name for name, hint in hints.items() if {int, float} & set(typing.get_args(hint) or (hint,))}
    assert numeric == set(option_ranges.RANGES)
    option_ranges.check(arguments.to_options(LEAST))
    for name in numeric:
        with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')}: -1 is no .*Give "):
            option_ranges.check(arguments.to_options({**LEAST, name: -1}))


def test_an_unknown_effort_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="quick, normal, high"):
        arguments.to_options({**LEAST, "effort": "some"})


def test_a_wrong_name_is_an_error_before_anything_begins() -> None:
    with pytest.raises(TypeError, match="max_dorp"):
        kedge.compile("m.onnx", **LEAST, max_dorp=0.1)  # type: ignore[call-arg,arg-type]
