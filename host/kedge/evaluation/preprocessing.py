"""Reading ``--preprocess``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kedge_protocol.bundle.config import Preprocess
from kedge_protocol.errors import ConfigError
from kedge_targets.graph.signature import TensorInfo
from kedge_targets.pipeline.normalization import channel_axis

_STEPS = ("scale", "mean", "std")
_FORM = "Write it as scale=1/255,mean=0.5,std=0.5; per channel as mean=0.485:0.456:0.406"


def parse(texts: Sequence[str], inputs: Sequence[TensorInfo]) -> dict[str, Preprocess]:
    """Preprocessing by input name.

    Args:
        texts: ``[NAME:]scale=…,mean=…,std=…`` each; without a name only where the model has one input.
        inputs: of the model.

    Raises:
        ConfigError: not of that form, an unknown input, a std of 0, as many values as the input has no channels.
    """
    found: dict[str, Preprocess] = {}
    for text in texts:
        prefix, steps = _split(text)
        spec = _input(prefix, inputs, text)
        if spec.name in found:
            raise ConfigError(f"input {spec.name!r} is named twice", where="--preprocess")
        how = _steps(steps, text)
        _check_channels(how, spec)
        found[spec.name] = how
    return found


def _split(text: str) -> tuple[str | None, str]:
    match = re.match(r"(?:(?P<name>.+?):)?(?P<steps>(?:scale|mean|std)=.*)\Z", text.strip())
    if match is None:
        raise ConfigError(f"{text!r} cannot be read", where="--preprocess", remedy=_FORM)
    return match["name"], match["steps"]


def _input(name: str | None, inputs: Sequence[TensorInfo], text: str) -> TensorInfo:
    known = ", ".join(spec.name for spec in inputs)
    if name is None:
        if len(inputs) != 1:
            raise ConfigError(
                f"{text!r} names none of the model's {len(inputs)} inputs",
                where="--preprocess",
                remedy=f"Begin with NAME: for one of {known}",
            )
        return inputs[0]
    for spec in inputs:
        if spec.name == name:
            return spec
    raise ConfigError(f"{name!r} is no input of the model", where="--preprocess", remedy=f"It has {known}")


def _steps(text: str, whole: str) -> Preprocess:
    values: dict[str, tuple[float, ...]] = {}
    for part in text.split(","):
        step, equals, numbers = part.strip().partition("=")
        if not equals or step not in _STEPS or step in values:
            raise ConfigError(f"{part!r} in {whole!r} cannot be read", where="--preprocess", remedy=_FORM)
        values[step] = tuple(_number(number, whole) for number in numbers.split(":"))
    if 0.0 in values.get("std", ()):
        raise ConfigError("a std of 0 divides by nothing", where="--preprocess")
    return Preprocess(**values)


def _number(text: str, whole: str) -> float:
    above, slash, below = text.partition("/")
    try:
        number = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(f"{text!r} in {whole!r} is no number", where="--preprocess", remedy=_FORM) from error
    if not abs(number) < float("inf"):
        raise ConfigError(f"{text!r} in {whole!r} is not finite", where="--preprocess", remedy=_FORM)
    return number


def _check_channels(how: Preprocess, spec: TensorInfo) -> None:
    channels = spec.shape[channel_axis(spec.layout, len(spec.shape))] if spec.shape else None
    for step in _STEPS:
        count = len(getattr(how, step))
        if count > 1 and channels is not None and count != channels:
            raise ConfigError(
                f"{step} has {count} values, input {spec.name!r} has {channels} channels",
                where="--preprocess",
                remedy="Give one value, or one for each channel",
            )
