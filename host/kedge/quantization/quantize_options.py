"""The options of quantization, the last step of every recipe, and the plan made from them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from kedge.options import Option
from kedge_protocol.errors import ConfigError
from kedge_targets.contract import Compiler
from kedge_targets.numerics import Family, Granularity, Plan, Precision, QuantizationScheme, RangeMethod
from kedge_targets.target import Target

WHERE = "recipe, quantize"


@dataclass(frozen=True, kw_only=True)
class Quantize:
    """Options of quantization. None leaves the choice to the backend."""

    precision: Annotated[Precision, Option("Precision of every layer that `layers` does not name.")] = Precision.INT8
    layers: Annotated[dict[str, Precision], Option("Node name to precision, for mixed precision.")] = field(
        default_factory=dict
    )
    granularity: Annotated[
        Granularity | None, Option("Whether weights have one scale per tensor or one per channel.")
    ] = None
    symmetric_activation: Annotated[
        bool | None, Option("Whether activations are quantized symmetrically (zero-point in the middle).")
    ] = None
    activation: Annotated[str | None, Option("Data type of activations: int8 or uint8.")] = None
    products: Annotated[
        bool | None, Option("Whether products of two activations (attention) are computed in int8 too.")
    ] = None
    range_method: Annotated[RangeMethod, Option("Calibration method for activation ranges.")] = RangeMethod.MIN_MAX
    percentile: Annotated[float, Option("Percentage of all values inside the range, for range_method percentile.")] = (
        99.99
    )
    group_size: Annotated[int, Option("Number of 4-bit weights that share one scale.")] = 32
    asymmetric_weights: Annotated[bool, Option("Whether each group of int4 weights has a zero-point.")] = True
    guard: Annotated[
        bool, Option("Keep layers in float, and report it, where int8 would lose an output (below 20 dB SQNR).")
    ] = True

    def plan(self, compiler: Compiler, target: Target) -> Plan:
        """Return the plan for a backend of this target.

        Raises:
            ConfigError: the backend does not support the options; the message says what it supports.
        """
        numerics = compiler.numerics
        for precision in (self.precision, *self.layers.values()):
            carried = numerics.precisions if precision is self.precision else (*numerics.precisions, *numerics.layers)
            if precision not in (*carried, Precision.FLOAT32):
                raise ConfigError(
                    f"the backend of {target.name} cannot carry {precision.value}",
                    where=WHERE,
                    remedy=f"It carries {', '.join(one.value for one in carried)}",
                )
        if self.layers and not numerics.mixed:
            raise ConfigError(
                f"the backend of {target.name} gives all layers one precision",
                where=f"{WHERE}, layers",
                remedy="Take layers out of the recipe",
            )
        if self.range_method not in numerics.range_methods and self._static():
            raise ConfigError(
                f"the backend of {target.name} does not know range_method {self.range_method.value}",
                where=WHERE,
                remedy=f"It knows {', '.join(one.value for one in numerics.range_methods)}",
            )
        if not 50 < self.percentile <= 100:
            raise ConfigError(f"percentile = {self.percentile} is not in (50, 100]", where=WHERE)
        if self.group_size < 1:
            raise ConfigError(f"group_size = {self.group_size} is no number of weights", where=WHERE)
        return Plan(
            default=self.precision,
            layers=dict(self.layers),
            scheme=self._scheme(compiler, target),
            range_method=self.range_method,
            percentile=self.percentile,
            group_size=self.group_size,
            asymmetric_weights=self.asymmetric_weights,
            guard=self.guard,
        )

    def _static(self) -> bool:
        return any(one.needs_calibration for one in (self.precision, *self.layers.values()))

    def _scheme(self, compiler: Compiler, target: Target) -> QuantizationScheme | None:
        schemes = compiler.quantized_for(target)
        asked = {
            "granularity": self.granularity,
            "symmetric_activation": self.symmetric_activation,
            "activation": self.activation,
            "products": self.products,
        }
        changes = {name: value for name, value in asked.items() if value is not None}
        integers = {Family.STATIC, Family.DYNAMIC} & {p.family for p in (self.precision, *self.layers.values())}
        if not schemes or not integers:
            if changes:
                raise ConfigError(
                    f"{sorted(changes)[0]} is of int8, which the recipe does not ask for or {target.name} has not",
                    where=WHERE,
                    remedy="Take it out of the recipe",
                )
            return None
        if not changes:
            return schemes[0]
        known = [*schemes, *compiler.numerics.schemes]
        for base in schemes:
            wanted = dataclasses.replace(base, **changes)  # type: ignore[arg-type]  # fields of the same names
            if wanted in known:
                return wanted
        raise ConfigError(
            f"the backend of {target.name} cannot quantize with "
            + ", ".join(f"{name} = {getattr(value, 'value', value)!r}" for name, value in changes.items()),
            where=WHERE,
            remedy="It can: " + "; ".join(_said(scheme) for scheme in known),
        )


def _said(scheme: QuantizationScheme) -> str:
    kind = "symmetric" if scheme.symmetric_activation else "asymmetric"
    products = "int8" if scheme.products else "float"
    return f"activation {scheme.activation} {kind}, weights {scheme.granularity.value}, products {products}"


def of_plan(plan: Plan, schemes: tuple[QuantizationScheme, ...]) -> Quantize:
    """Return the options that reproduce a plan, without those that equal the backend's own choice (its first
    scheme)."""
    default, scheme = schemes[0] if schemes else None, plan.scheme

    def chosen(name: str) -> Any:
        """Return an attribute of the scheme if it differs from the backend's own choice."""
        if scheme is None or default is None or getattr(scheme, name) == getattr(default, name):
            return None
        return getattr(scheme, name)

    return Quantize(
        precision=plan.default,
        layers=dict(plan.layers),
        granularity=chosen("granularity"),
        symmetric_activation=chosen("symmetric_activation"),
        activation=chosen("activation"),
        products=chosen("products"),
        range_method=plan.range_method,
        percentile=plan.percentile,
        group_size=plan.group_size,
        asymmetric_weights=plan.asymmetric_weights,
        guard=plan.guard,
    )
