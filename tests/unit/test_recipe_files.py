"""Recipes: what is written is read again, and what a person writes wrongly is told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.quantization.quantize_options import Quantize
from kedge.search import recipe, recipe_args
from kedge.search.candidate import Candidate, StepChoice
from kedge_protocol.errors import ConfigError
from kedge_targets import registry, target
from kedge_targets.numerics import Plan, Precision, RangeMethod


def read(tmp_path: Path, text: str) -> recipe.Recipe:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return recipe.read(path)


def test_a_candidate_survives_writing_and_reading(tmp_path: Path) -> None:
    device = target.find("generic-cpu")
    compiler = registry.compiler(device.backends[0].name)
    made = Candidate(
        backend=device.backends[0],
        steps=(StepChoice(use="distil"),),
        plan=Plan(
            default=Precision.INT8,
            layers={"conv 1": Precision.FLOAT32},
            scheme=compiler.quantized_for(device)[0],
            ranges={"x": (0.0, 1.0)},
        ),
        reasons={"conv 1": "it suffers"},
    )
    section = recipe.section_of(made, compiler, device)
    text = recipe.written({"generic-cpu": section}, seed=7, heading=["Why: because"])
    assert text.startswith("# Why: because\n")
    back = read(tmp_path, text)
    assert back.seed == 7
    found = back.section("generic-cpu")
    assert found is not None
    again = recipe.candidate(found, device)
    assert again.steps == made.steps
    assert again.plan == Plan(default=Precision.INT8, layers=made.plan.layers, scheme=made.plan.scheme)
    assert back.section("rpi4") is None


def test_a_way_that_is_not_the_usual_survives_too(tmp_path: Path) -> None:
    device = target.find("generic-cpu")
    compiler = registry.compiler(device.backends[0].name)
    usual = compiler.quantized_for(device)[0]
    way = replace(usual, products=not usual.products)
    made = Candidate(backend=device.backends[0], plan=Plan(default=Precision.INT8, scheme=way))
    text = recipe.written({"generic-cpu": recipe.section_of(made, compiler, device)}, seed=7, heading=[])
    assert "products = true" in text
    found = read(tmp_path, text).section("generic-cpu")
    assert found is not None
    assert recipe.candidate(found, device).plan == made.plan


def test_a_targets_own_section_stands_instead_of_the_rest(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        '[quantize]\nprecision = "int8"\n[[step]]\nuse = "distil"\n[target.rpi4.quantize]\nprecision = "float16"\n',
    )
    general, own = found.section("intel-cpu"), found.section("rpi4")
    assert general is not None
    assert own is not None
    assert (general.quantize.precision, len(general.step)) == (Precision.INT8, 1)
    assert (own.quantize.precision, own.step) == (Precision.FLOAT16, ())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("precison = 1", "precison"),
        ('[quantize]\nprecision = "int9"', "int9"),
        ("[quantize]\nrange = 3", "range"),
        ('[[step]]\nuse = "polish"', "there is no step 'polish'"),
        ("[[step]]\nratio = 0.5", "does not say which step it is"),
        ('[[step]]\nuse = "distil"\nepoks = 3', "epoks"),
        ("schema = 9", "schema 9"),
        ("not toml", "is not TOML"),
        ("[target.rpi4]\nbackends = 1", "backends"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text)
    assert said in str(raised.value)


def test_what_a_target_cannot_carry_is_told_with_what_it_can(tmp_path: Path) -> None:
    found = read(tmp_path, '[quantize]\nprecision = "w2a2"\n')
    section = found.section("generic-cpu")
    assert section is not None
    with pytest.raises(ConfigError, match=r"cannot carry w2a2.*int8"):
        recipe.candidate(section, target.find("generic-cpu"))


def test_steps_on_the_command_line() -> None:
    found = recipe_args.parse_recipe(["distil: temperature=3.5"], "precision=int8,range_method=mse,percentile=99.9")
    assert found is not None
    assert found.step == ({"use": "distil", "temperature": 3.5},)
    assert found.quantize == Quantize(precision=Precision.INT8, range_method=RangeMethod.MSE, percentile=99.9)
    assert recipe_args.parse_recipe([], None) is None


def test_options_on_the_command_line_are_toml_or_words() -> None:
    assert recipe_args.options("a=1, b=0.5,c=word,d=true,e=[1, 2],f={x = 1, y = 's'}", where="w") == {
        "a": 1,
        "b": 0.5,
        "c": "word",
        "d": True,
        "e": [1, 2],
        "f": {"x": 1, "y": "s"},
    }
    for wrong in ("a", "a=1,a=2", "=3"):
        with pytest.raises(ConfigError):
            recipe_args.options(wrong + ",b", where="w")


@given(
    precision=st.sampled_from([Precision.INT8, Precision.FLOAT16, Precision.FLOAT32]),
    method=st.sampled_from(list(RangeMethod)),
    percentile=st.floats(60, 100),
    group=st.integers(1, 512),
    layers=st.dictionaries(st.text(min_size=1, max_size=12), st.just(Precision.FLOAT32), max_size=4),
)
def test_quantize_survives_toml(
    tmp_path_factory: pytest.TempPathFactory,
    precision: Precision,
    method: RangeMethod,
    percentile: float,
    group: int,
    layers: dict[str, Precision],
) -> None:
    how = Quantize(precision=precision, range_method=method, percentile=percentile, group_size=group, layers=layers)
    text = recipe.written({"any": recipe.Section(quantize=how)}, seed=0)
    back = read(tmp_path_factory.mktemp("recipe"), text).section("any")
    assert back is not None
    assert back.quantize == how
