"""Loads a bundle's ``.param`` and ``.bin`` in ncnn on a CPU, and runs them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kedge_protocol.errors import ConfigError, InputError, MissingDependencyError, VerificationError
from kedge_protocol.packages import AGENT, pip_install
from kedge_targets import contract
from kedge_targets.contract import Array

FAST = "fast"
PLAIN = "plain"
WEIGHTS = ".bin"
"""Suffix of the file with the weights, beside the entry."""
_KNOWN_OPTIONS = frozenset({"threads"})


class Runtime(contract.Runtime):
    """Runs models in ncnn, computed in float32 whatever the weights are stored as, so that devices agree.

    Options:
        threads: number of threads for one call; 0 lets the library choose.
    """

    distributions = ("ncnn",)

    @property
    def kernel_sets(self) -> tuple[str, ...]:
        """Return the kernel sets. ``fast``: ncnn's default, by Winograd's method, matrix products and packed channels
        where a processor has them. ``plain``: without."""
        return (FAST, PLAIN)

    def check(self) -> None:
        """Raise :class:`MissingDependencyError` if ncnn is not installed."""
        _library()

    def load(self, entry: Path, options: Mapping[str, Any], *, kernel_set: str | None = None) -> Session:
        """See :meth:`kedge_targets.contract.Runtime.load`."""
        threads = _threads(options)
        if kernel_set not in (None, FAST, PLAIN):
            raise ConfigError(f"unknown kernel set {kernel_set!r}", remedy=f"Known are {FAST} and {PLAIN}")
        ncnn = _library()
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        for name in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage"):
            setattr(net.opt, name, False)
        if threads:
            net.opt.num_threads = threads
        if kernel_set == PLAIN:
            for name in ("use_winograd_convolution", "use_sgemm_convolution", "use_packing_layout"):
                setattr(net.opt, name, False)
        for path, load in ((entry, net.load_param), (entry.with_suffix(WEIGHTS), net.load_model)):
            if not path.is_file() or load(str(path)) != 0:
                raise VerificationError(
                    "ncnn refuses the file",
                    where=path.name,
                    remedy="The file is damaged, or made for another version",
                )
        return Session(ncnn, net)


class Session(contract.Session):
    """One loaded model, for one thread at a time. ncnn knows no batch: it is taken off and put back."""

    def __init__(self, ncnn: Any, net: Any) -> None:
        self._ncnn, self._net = ncnn, net
        self._inputs, self._outputs = list(net.input_names()), list(net.output_names())

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: ncnn cannot run these arrays.
        """
        extractor = self._net.create_extractor()
        kept = [np.ascontiguousarray(array[0], np.float32) for array in inputs]
        for name, array in zip(self._inputs, kept, strict=True):
            if extractor.input(name, self._ncnn.Mat(array)) != 0:
                raise InputError(f"ncnn takes no array of shape {array.shape} for {name}")
        found = []
        for name in self._outputs:
            failed, made = extractor.extract(name)
            if failed != 0:
                raise InputError(f"ncnn cannot run these arrays: {name} is not computed")
            found.append(np.array(made)[None])
        return found

    def close(self) -> None:
        """Free the model."""
        self._net.clear()


def has_layer(kind: str) -> bool:
    """Return whether ncnn has a kind of layer."""
    return bool(_library().layer_to_index(kind) >= 0)


def _library() -> Any:
    try:
        import ncnn
    except ImportError as error:
        raise MissingDependencyError(
            f"ncnn cannot be loaded: {error}", remedy=f"Install it with {pip_install('ncnn', of=AGENT)}"
        ) from error
    return ncnn


def _threads(options: Mapping[str, Any]) -> int:
    if unknown := sorted(set(options) - _KNOWN_OPTIONS):
        raise ConfigError(f"unknown runtime option {unknown[0]!r}", remedy=f"Known are {sorted(_KNOWN_OPTIONS)}")
    threads = options.get("threads", 0)
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 0:
        raise ConfigError(f"threads = {threads!r} is no number of threads", remedy="Give 0 or more")
    return threads
