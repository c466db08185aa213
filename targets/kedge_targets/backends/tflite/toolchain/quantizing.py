"""Quantizes to int8 with TFLite's own quantizer, leaving single operators in float; a file is checked against the float
one."""

import contextlib
import itertools

import comparing
import flat_activations
import flatbuffer
import numpy
import unseen_ends
import widening
from fewest import fewest

_WORTH = 1.0  # dB that a further operator in float must bring
_FEWEST, _MOST = 8, 128  # groups of samples that are compared
_ELEMENTS = 1 << 22  # of all tensors together, in what is compared beyond the fewest groups
_ROUNDS = 4
_RETURNS = 16  # trials to take operators back into integers that are not needed in float
_NOTHING = 1e-6  # of the middle one of the largest values of all tensors that are not always 0
_ENDS = 256  # groups of samples whose ends are looked at
_UNLIKE = 4.0  # of two ranges: a step for the one is coarse for the other
_ARITHMETIC = 64  # a convolution to one channel of no more weights than this is arithmetic (a mean), no layer
_SHARE = 0.1  # of all weights' bytes, that may be kept in float without being asked
_FREE = 16384  # bytes, likewise
_CUT = 0.02  # of a range
_CLIPS = frozenset({"MINIMUM", "MAXIMUM"})
_WEIGHTED = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "FULLY_CONNECTED": 1, "TRANSPOSE_CONV": 1, "CONV_3D": 1,
             "BATCH_MATMUL": 1}  # fmt: skip
_ONE_SCALE = _CLIPS | {
    "BATCH_TO_SPACE_ND", "BROADCAST_TO", "CONCATENATION", "DEPTH_TO_SPACE", "EXPAND_DIMS", "GATHER", "GATHER_ND",
    "MAX_POOL_2D", "MIRROR_PAD", "PACK", "PAD", "PADV2", "REDUCE_MAX", "REDUCE_MIN", "RESHAPE", "RESIZE_BILINEAR",
    "RESIZE_NEAREST_NEIGHBOR", "REVERSE_V2", "SELECT", "SELECT_V2", "SLICE", "SPACE_TO_BATCH_ND", "SPACE_TO_DEPTH",
    "SPLIT", "SPLIT_V", "SQUEEZE", "STRIDED_SLICE", "TILE", "TRANSPOSE", "UNPACK",
}  # fmt: skip
"""Operators whose inputs and outputs get one common scale from the quantizer."""
_DIVIDED_BY_ZERO = "kernels/div.cc"
_FLOAT_ALONE = frozenset({"REVERSE_SEQUENCE"})
"""Operators that the quantizer rounds, and of which TFLite has no int8 kernel."""


class Quantizer:
    """A float file and what calibration observed in it; int8 files are made from these in milliseconds.

    Args:
        content: the float file.
        groups: a function that returns an iterator over groups of samples, each a list of arrays in the file's layout.
    """

    def __init__(self, content, groups):
        from tensorflow.lite.python.optimize import calibrator

        self._float = content
        self.groups = groups
        extended = calibrator.add_intermediate_tensors(content)
        self._observed = calibrator.Calibrator(extended, [], []).calibrate(groups)
        self.wiring = flatbuffer.Wiring(flatbuffer.parsed(self._observed))
        elements = sum(self.wiring.size_of(one) for one in self.wiring.maker)
        self._groups = min(max(_FEWEST, _ELEMENTS // max(1, elements)), _MOST)
        self._forms = {}
        self._reference = comparing.Run(content, fast=True)
        self._wanted = []
        self._wide = frozenset()

    def _form(self, beyond):
        """Return the model with its ranges, and these by the tensors' names.

        Args:
            beyond: let ranges reach further than calibration saw: for files that no search holds against other samples.
        """
        if beyond not in self._forms:
            model = flatbuffer.parsed(self._observed)
            tensors = model.subgraphs[0].tensors
            seen = {tensor.name: found for tensor in tensors if (found := flatbuffer.range_of(tensor)) is not None}
            for change in (self._beyond if beyond else _nothing, self._never_nothing, self._narrowed):
                for tensor, bounds in change(seen).items():
                    held = tensors[tensor]
                    held.quantization.min, held.quantization.max = ([bound] for bound in bounds)
                    seen[held.name] = bounds
            self._forms[beyond] = model, seen
        return self._forms[beyond]

    def _narrowed(self, seen):
        return flat_activations.narrowed(self.wiring, seen)

    def _never_nothing(self, seen):
        """Return a range for each tensor that was as good as always 0: XNNPACK refuses the scale that it would get."""
        sizes = {name: max(map(abs, found)) for name, found in seen.items()}
        # The largest may be far from all others, as what an exponential gives to a logarithm.
        zero = float(numpy.finfo(numpy.float32).tiny)
        nothing = max(zero, _NOTHING * float(numpy.median([one for one in sizes.values() if one > zero] or [zero])))
        names = [tensor.name for tensor in self.wiring.graph.tensors]
        return {at: (0.0, 1.0) for at, name in enumerate(names) if sizes.get(name, 1.0) <= nothing}

    def _beyond(self, seen):
        """Return the ranges of tensors with few values that reach as far as more samples would."""
        tensors = self.wiring.graph.tensors
        few = [
            one
            for one in (*self.wiring.given, *self.wiring.maker)
            if 0 < self.wiring.size_of(one) <= unseen_ends.FEW and tensors[one].name in seen
        ]
        if not few:
            return {}
        run = comparing.Run(self._float, fast=False, watched=True)
        ends = {one: unseen_ends.Ends() for one in few}
        for group in itertools.islice(self.groups(), _ENDS):
            run(group)
            for one in few:
                ends[one].add(run.tensor(one))
        return {one: ends[one].beyond(*seen[tensors[one].name]) for one in few}

    def can_widen(self, at):
        """Return whether an operator may have activations of 16 bits."""
        return self.wiring.names[at] in widening.CHANNELS and self.wiring.constant(self.wiring.inputs[at][1])

    def quantized(self, asked, guard=False, wide=frozenset()):
        """Return the file with the operators ``asked`` (indices in the float file) in float, the indices of all that
        are not in int8, and each output's dB (None if it is not float).

        Args:
            guard: keep as many more in float as it takes for every output to be accurate enough; else only what has few
                weights.
            wide: operators with activations of 16 bits.
        """
        self._wide = frozenset(wide)
        self._calibrated, self._ranges = self._form(guard)
        asked = set(asked) | self._wide
        unable = {at for at in self._all() if self.wiring.names[at] in _FLOAT_ALONE}
        try:
            return self._searched(asked, unable, guard)
        except RuntimeError as error:
            # A divisor near 0 is 0 as an integer, and the kernel ends the run.
            divisions = {at for at in self._all() if self.wiring.names[at] == "DIV"}
            if _DIVIDED_BY_ZERO not in str(error) or divisions <= asked:
                raise
            return self._searched(asked, unable | divisions, guard)

    def _searched(self, asked, unable, guard):
        """Return what :meth:`quantized` does, with the operators ``unable`` in float too."""
        floating = asked | unable | self._separate_clips() | self._unlike_tails()
        content, floating = self._without_cut_ranges(floating)
        found = self._compared(content)
        allowed = max(_FREE, _SHARE * self._weights(self._all()))
        best = (content, floating, found)
        for more in self._further(found):
            if _worst(best[2]) >= comparing.FLOOR:
                break
            wider = floating | more
            if wider == floating or self._weights(wider - asked) > allowed:
                continue
            other, wider = self._without_cut_ranges(wider)
            better = self._compared(other)
            if _total(better) >= _total(best[2]) + _WORTH:
                best = (other, wider, better)
        return self._guarded(*best[:2]) if guard else best

    def _guarded(self, content, floating):
        """Keep operators in float, the noisiest first, until every output is accurate enough."""
        found = self._compared(content, closely=True)
        order = self._noisiest(content, self._bad(found, comparing.SURE)) if _worst(found) < comparing.SURE else []
        if not order:
            return content, floating, found

        def tried(more):
            content, wider = self._without_cut_ranges(floating | set(more))
            found = self._compared(content, closely=True)
            return (content, wider, found), _worst(found) >= comparing.SURE

        return fewest(order, tried, along=range(len(self.wiring.names)), returns=_RETURNS)[0]

    def _noisiest(self, content, outputs):
        """Return the operators before these outputs, sorted by the noise that each adds to its inputs, most first."""
        behind, pending = set(), list(outputs)
        while pending:
            at = self.wiring.maker.get(pending.pop())
            if at is not None and at not in behind:
                behind.add(at)
                pending += self.wiring.inputs[at]
        noise = self._noise(content)
        added = {}
        for at in sorted(behind):
            given = max((noise.get(one, 0.0) for one in self.wiring.inputs[at]), default=0.0)
            own = max((noise[one] for one in self.wiring.outputs[at] if one in noise), default=given)
            noise.update((one, noise.get(one, own)) for one in self.wiring.outputs[at])
            added[at] = own - given
        return sorted(added, key=lambda at: -added[at])

    def _noise(self, content):
        """Return tensor of the float file → noise-to-signal ratio in another file, if that has a tensor with the same
        name."""
        float_run, run = (comparing.Run(one, fast=False, watched=True) for one in (self._float, content))
        names = {tensor: self.wiring.graph.tensors[tensor].name for tensor in self.wiring.maker}
        there = {name.encode(): tensor for name, tensor in reversed(run.tensors())}
        power, error = {}, {}
        for group in self._some(_FEWEST):
            float_run(group)
            run(group)
            for tensor, name in names.items():
                if name not in there:
                    continue
                wanted = float_run.tensor(tensor).astype(numpy.float64)
                got = run.tensor(there[name])
                if wanted.shape == got.shape:
                    power[tensor] = power.get(tensor, 0.0) + float((wanted**2).sum())
                    error[tensor] = error.get(tensor, 0.0) + float(((wanted - got) ** 2).sum())
        return {tensor: error[tensor] / power[tensor] for tensor in power if power[tensor] > 0}

    def _further(self, found):
        """Return what to keep in float if an output is too inaccurate, cheapest first: what lies between the last
        layers and it, the first layers, the last layers."""
        bad = self._bad(found)
        behind = set().union(*(self._tail(tensor) for tensor in bad))
        last = set().union(*(self._ends(tensor) for tensor in bad))
        head = self._head()
        return [behind, head, behind | head, behind | last, behind | last | head]

    def _bad(self, found, least=comparing.FLOOR):
        return [
            tensor for tensor, one in zip(self.wiring.answers, found, strict=True) if one is not None and one < least
        ]

    def _all(self):
        return set(range(len(self.wiring.names)))

    def _made(self, floating):
        """Return the quantized file, with int8 inputs and outputs if int8 follows or precedes them, and the range that
        each of its int8 tensors can hold, by name."""
        from tensorflow.lite.python.convert import mlir_quantize

        hidden, kept = flatbuffer.hidden(self._calibrated, sorted(floating))
        model = flatbuffer.parsed(mlir_quantize(hidden))
        found = flatbuffer.brought_back(model, kept)
        if len(found) != len(kept):
            raise RuntimeError(f"of {len(kept)} operators that were to stay in float {len(found)} are left")
        flatbuffer.without_rounding_at_the_ends(model)
        widening.widen(model, [(found[flatbuffer.hidden_name(at)], *self._bounds(at)) for at in sorted(self._wide)])
        holds = {}
        for tensor in model.subgraphs[0].tensors:
            held = flatbuffer.represented(tensor)
            if held is not None:
                holds.setdefault(tensor.name, held)
        return flatbuffer.packed(model), holds

    def _bounds(self, at):
        """Return (low, high) of an operator's input and of its output."""
        ends = self.wiring.inputs[at][0], self.wiring.outputs[at][0]
        return [self._ranges[self.wiring.graph.tensors[one].name] for one in ends]

    def _without_cut_ranges(self, floating):
        """Return the file with those operators in float too whose neighbours would have to share too narrow a range."""
        content, holds, floating = self._accepted(floating)
        for _ in range(_ROUNDS):
            more = self._narrowing(holds) - floating
            if not more:
                break
            content, holds, floating = self._accepted(floating | more)
        return content, floating

    def _accepted(self, floating):
        """Return what :meth:`_made` does, and the operators in float: one more, or all that join tensors, where the
        quantizer finds no scale for all that it wants alike ("violate the same scale constraint")."""
        try:
            return *self._made(floating), floating
        except RuntimeError:
            joining = [at for at in sorted(self._all() - floating) if self._joins(at)]
            for more in (*({at} for at in joining), set(joining)):
                with contextlib.suppress(RuntimeError):
                    return *self._made(floating | more), floating | more
            raise

    def _joins(self, at):
        computed = [one for one in self.wiring.inputs[at] if not self.wiring.constant(one)]
        return self.wiring.names[at] in _ONE_SCALE and len(computed) > 1

    def _narrowing(self, holds):
        """Return operators that give a tensor a range narrower than calibration observed and another reader needs."""
        found = set()
        for index, tensor in enumerate(self.wiring.graph.tensors):
            seen, held = self._ranges.get(tensor.name), holds.get(tensor.name)
            if seen is None or held is None or not _cut(seen, held):
                continue
            readers = self.wiring.readers.get(index, [])
            if index not in self.wiring.answers and all(self._clips(at) for at in readers):
                continue
            near = [*readers, *([self.wiring.maker[index]] if index in self.wiring.maker else [])]
            found |= {at for at in near if self.wiring.names[at] in _ONE_SCALE}
        return found

    def _clips(self, at):
        return self.wiring.names[at] in _CLIPS and any(self.wiring.constant(one) for one in self.wiring.inputs[at])

    def _separate_clips(self):
        """Return clips (MINIMUM, MAXIMUM) of tensors that others read too; the quantizer would clip them for all
        readers."""
        wiring = self.wiring
        found = set()
        for at in self._all():
            sources = [one for one in wiring.inputs[at] if not wiring.constant(one)]
            if not any(len(wiring.readers[one]) > 1 or one in wiring.answers for one in sources):
                continue
            while at not in found and self._clips(at):
                found.add(at)
                # The other half of the same clip.
                behind = wiring.readers.get(wiring.outputs[at][0], [])
                if len(behind) == 1:
                    at = behind[0]
        return found

    def _unlike_tails(self):
        """Return what lies behind the last layers, for each output that joins unlike ranges (boxes beside scores)."""
        found = set()
        for tensor in self.wiring.answers:
            tail = self._tail(tensor)
            if any(self._joins_unlike(at) for at in tail):
                found |= tail
        return found

    def _joins_unlike(self, at):
        if self.wiring.names[at] not in ("CONCATENATION", "PACK"):
            return False
        widths = []
        for tensor in self.wiring.inputs[at]:
            seen = self._ranges.get(self.wiring.graph.tensors[tensor].name)
            if seen is not None and not self.wiring.constant(tensor):
                widths.append(max(seen[1], 0.0) - min(seen[0], 0.0))
        return len(widths) > 1 and max(widths) > _UNLIKE * min(widths)

    def _tail(self, tensor):
        """Return the operators between the last layers and a tensor."""
        found, pending = set(), [tensor]
        while pending:
            at = self.wiring.maker.get(pending.pop())
            if at is not None and at not in found and not self._is_layer(at):
                found.add(at)
                pending += self.wiring.inputs[at]
        return found

    def _ends(self, tensor):
        """Return the layers that the tail of a tensor reads."""
        tail = self._tail(tensor)
        read = {one for at in tail for one in self.wiring.inputs[at]} | {tensor}
        makers = {self.wiring.maker[one] for one in read if one in self.wiring.maker}
        return {at for at in makers if self._is_layer(at)}

    def _head(self):
        """Return the first layers, and what lies before them and directly behind them."""
        found, pending = set(), list(self.wiring.given)
        while pending:
            for at in self.wiring.readers.get(pending.pop(), []):
                if at not in found:
                    found.add(at)
                    pending += [] if self._is_layer(at) else self.wiring.outputs[at]
        return found

    def _is_layer(self, at):
        """Return whether an operator multiplies by weights, or multiplies two activations."""
        weight = _WEIGHTED.get(self.wiring.names[at])
        if weight is None:
            return False
        tensor = self.wiring.inputs[at][weight]
        if not self.wiring.constant(tensor):
            return True
        return self.wiring.size_of(tensor) > _ARITHMETIC or int(self.wiring.graph.tensors[tensor].shape[0]) != 1

    def _weights(self, operators):
        tensors = {one for at in operators for one in self.wiring.inputs[at] if self.wiring.constant(one)}
        return sum(self.wiring.bytes_of(one) for one in tensors)

    def _compared(self, content, closely=False):
        """Return each output's dB against the float file over some samples, the worse of LiteRT's two kernel sets.

        Args:
            closely: over more samples, and of every few by themselves.
        """
        groups = self._groups if closely else _FEWEST
        for group in itertools.islice(self._some(groups), len(self._wanted), None):
            self._wanted.append(self._reference(group))
        judge = comparing.held if closely else comparing.decibels
        worst = None
        for fast in (False, True):
            try:
                run = comparing.Run(content, fast)
            except RuntimeError:
                if not fast:
                    raise
                # XNNPACK refuses scales that are too far apart: such a file is no answer.
                return [None if one is None else comparing.NO_ANSWER for one in worst]
            got = [run(group) for group in self._some(groups)]
            pairs = zip(comparing.by_output(self._wanted[: len(got)]), comparing.by_output(got), strict=True)
            found = [judge(wanted, mine) for wanted, mine in pairs]
            worst = found if worst is None else [comparing.lower(*pair) for pair in zip(worst, found, strict=True)]
        return worst

    def _some(self, groups):
        return itertools.islice(self.groups(), groups)


def _nothing(seen):
    """Change no range."""
    return {}


def _worst(found):
    return min((one for one in found if one is not None), default=comparing.SURE)


def _total(found):
    """Return the quantity to improve: how far the outputs lie below the floor."""
    return sum(min(one, comparing.FLOOR) for one in found if one is not None)


def _cut(seen, held):
    width = max(seen[1], 0.0) - min(seen[0], 0.0)
    return seen[0] < held[0] - _CUT * width or seen[1] > held[1] + _CUT * width
