"""Runs a file in LiteRT and says how far its outputs lie from another's, in dB."""

import numpy

FLOOR = 20.0
"""Lowest acceptable dB of an output against the float file's; below it, something is wrong and not merely coarse."""

SURE = FLOOR + 2.0
"""dB that the guard requires on calibration samples, since unseen samples do no better."""

NO_ANSWER = -200.0
"""dB of an output that is not finite, or of a file that does not run."""

_TOGETHER = 4  # groups that are also judged by themselves; others would hide a single bad answer


class Run:
    """A file in LiteRT, with float inputs and outputs."""

    def __init__(self, content, fast, watched=False):
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        kind = OpResolverType.AUTO if fast else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self._interpreter = Interpreter(
            model_content=content, experimental_op_resolver_type=kind, experimental_preserve_all_tensors=watched
        )
        self._interpreter.allocate_tensors()
        self._given = self._interpreter.get_input_details()
        self._made = self._interpreter.get_output_details()

    def __call__(self, group):
        for detail, array in zip(self._given, group, strict=True):
            scale, zero = detail["quantization"]
            if detail["dtype"] is numpy.int8 and array.dtype.kind == "f":
                array = numpy.clip(numpy.round(array / scale) + zero, -128, 127).astype(numpy.int8)
            self._interpreter.set_tensor(detail["index"], array)
        self._interpreter.invoke()
        return [self._read(detail) for detail in self._made]

    def tensors(self):
        """Return name and index of each tensor, in the file's order."""
        return [(detail["name"], detail["index"]) for detail in self._interpreter.get_tensor_details()]

    def tensor(self, index):
        """Return a tensor's content after a call, as floats; only for a watched file."""
        return self._read(self._interpreter._get_tensor_details(index, subgraph_index=0))

    def _read(self, detail):
        array = self._interpreter.get_tensor(detail["index"])
        scale, zero = detail["quantization"]
        return (array.astype(numpy.float32) - zero) * scale if array.dtype == numpy.int8 and scale else array


def by_output(answers):
    """Return each output's arrays over groups, from each group's outputs."""
    return list(zip(*answers, strict=True))


def held(wanted, got):
    """Return the dB of one output over all groups, or of a few of them plus what these may lie below; None for
    integers."""
    starts = range(0, len(wanted), _TOGETHER)
    parts = [decibels(*(one[at : at + _TOGETHER] for one in (wanted, got))) for at in starts]
    whole = decibels(wanted, got)
    return None if whole is None else min(whole, min(parts) + SURE - FLOOR)


def decibels(wanted, got):
    """Return the signal-to-noise ratio of one output over groups; None for integers."""
    if wanted[0].dtype.kind != "f":
        return None
    wanted = numpy.concatenate([one.reshape(-1) for one in wanted]).astype(numpy.float64)
    got = numpy.concatenate([one.reshape(-1) for one in got]).astype(numpy.float64)
    seen = numpy.isfinite(wanted)
    if not numpy.isfinite(got[seen]).all():
        return NO_ANSWER
    noise = float(((wanted - got)[seen] ** 2).sum())
    signal = float((wanted[seen] ** 2).sum())
    return 200.0 if noise == 0 else float(numpy.clip(10 * numpy.log10(max(signal, 1e-300) / noise), NO_ANSWER, 200))


def lower(first, second):
    """Return the worse of two dB; None for integers."""
    return None if first is None else min(first, second)
