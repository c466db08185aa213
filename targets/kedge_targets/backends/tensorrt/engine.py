"""Runs an engine: named tensors, pinned buffers, one stream, and a CUDA graph if the shapes are static."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np

from kedge_protocol.errors import InputError, KedgeError, VerificationError
from kedge_targets import contract
from kedge_targets.backends.tensorrt import cuda
from kedge_targets.backends.tensorrt.api import Api
from kedge_targets.backends.tensorrt.recipe import InputProfile
from kedge_targets.contract import Array

log = logging.getLogger("kedge.tensorrt")


@dataclass(frozen=True)
class Tensors:
    """An engine's tensors, in the ONNX file's order.

    Attributes:
        inputs: profiles with the shapes that the engine was built for.
        outputs: names of the outputs.
    """

    inputs: tuple[InputProfile, ...]
    outputs: tuple[str, ...]

    @property
    def static(self) -> bool:
        """Return whether every input has only one shape."""
        return all(item.static for item in self.inputs)


class Session(contract.Session):
    """One engine with one execution context, for one thread at a time.

    With static shapes the work of one call, including copies, is recorded once as a CUDA graph and launched as a whole.
    With a dynamic batch, one that is larger than the engine was built for is run in pieces.

    Args:
        api: adapter of the TensorRT that built the engine.
        engine: its bytes, built by this device itself.
        tensors: the engine's tensors.
        detail: see :attr:`kedge_targets.contract.Session.detail`.

    Raises:
        VerificationError: TensorRT or CUDA refuses the engine, or there is not enough memory.
    """

    def __init__(self, api: Api, engine: bytes, tensors: Tensors, *, detail: str) -> None:
        self.detail = detail
        self._api = api
        self._profiles = tensors.inputs
        self._names = tensors.outputs
        self._buffers: dict[str, cuda.Buffer] = {}
        self._stream: cuda.Stream | None = None
        self._context: Any = None
        try:
            self._engine = api.deserialize(engine)
            self._context = self._engine.create_execution_context()
            if self._context is None:
                raise VerificationError(f"TensorRT gives no execution context: {api.last_words()}")
            self._shape([item.maximum for item in self._profiles])
            for name in (*(item.name for item in self._profiles), *self._names):
                self._bind(name)
            self._stream = cuda.Stream()
            self._inputs = [self._buffers[item.name] for item in self._profiles]
            self._outputs = [self._buffers[name] for name in self._names]
            self._launch = self._enqueue
            # Once without recording: TensorRT prepares itself in the first call.
            self._enqueue()
            self._stream.wait()
            if tensors.static:
                self._record(self._stream)
        except BaseException:
            self.close()
            raise

    def run(self, inputs: list[Array]) -> list[Array]:
        """See :meth:`kedge_targets.contract.Session.run`.

        Raises:
            InputError: the engine's tensors have other shapes or types; or the session is closed.
            VerificationError: CUDA fails.
        """
        stream = self._stream
        if stream is None:
            raise InputError("the model is closed")
        if any(array.shape != buffer.host.shape for array, buffer in zip(inputs, self._inputs, strict=True)):
            largest = self._profiles[0].maximum[0]
            if all(p.minimum[:1] != p.maximum[:1] for p in self._profiles) and len(inputs[0]) > largest:
                return self._in_pieces(inputs, largest)
            self._reshape([array.shape for array in inputs])
        for buffer, array in zip(self._inputs, inputs, strict=True):
            try:
                np.copyto(buffer.host, array, casting="same_kind")
            except TypeError as error:
                raise InputError(f"the engine takes {buffer.host.dtype}, {array.dtype} was given") from error
        self._launch()
        stream.wait()
        return [buffer.host.copy() for buffer in self._outputs]

    def close(self) -> None:
        """Free the context, the engine and the memory."""
        # In this order: a graph holds on to the context's work, the context to the engine's weights.
        stream, self._stream = self._stream, None
        buffers, self._buffers = self._buffers, {}
        self._inputs, self._outputs = [], []
        with contextlib.suppress(KedgeError):
            if stream is not None:
                stream.wait()
                stream.close()
        self._context = None
        self._engine = None
        for buffer in buffers.values():
            with contextlib.suppress(KedgeError):
                buffer.close()

    def _in_pieces(self, inputs: list[Array], size: int) -> list[Array]:
        starts = range(0, len(inputs[0]), size)
        runs = [self.run([array[start : start + size] for array in inputs]) for start in starts]
        return [np.concatenate(column) for column in zip(*runs, strict=True)]

    def _reshape(self, shapes: list[tuple[int, ...]]) -> None:
        for profile, shape in zip(self._profiles, shapes, strict=True):
            sizes = zip(profile.minimum, shape, profile.maximum, strict=False)
            if len(shape) != len(profile.minimum) or not all(low <= size <= high for low, size, high in sizes):
                wanted = str(profile.minimum) if profile.static else f"{profile.minimum} to {profile.maximum}"
                raise InputError(f"the engine takes shape {wanted} for {profile.name!r}, {shape} was given")
        self._shape(shapes)
        for buffer, shape in zip(self._inputs, shapes, strict=True):
            buffer.reshape(shape)
        for name, buffer in zip(self._names, self._outputs, strict=True):
            buffer.reshape(self._shape_of(name))

    def _shape(self, shapes: list[tuple[int, ...]]) -> None:
        for profile, shape in zip(self._profiles, shapes, strict=True):
            if not profile.static and not self._context.set_input_shape(profile.name, shape):
                raise VerificationError(
                    f"TensorRT does not take shape {shape} for {profile.name!r}: {self._api.last_words()}"
                )

    def _shape_of(self, name: str) -> tuple[int, ...]:
        """Return a tensor's current shape; the context knows it once the shapes of all inputs are set."""
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise VerificationError(f"the shape of tensor {name!r} depends on the data: {shape}")
        return shape

    def _bind(self, name: str) -> None:
        try:
            dtype = self._api.library.nptype(self._engine.get_tensor_dtype(name))
        except TypeError as error:
            raise VerificationError(f"the engine's tensor {name!r} has a type that numpy lacks") from error
        buffer = self._buffers[name] = cuda.Buffer(self._shape_of(name), dtype)
        if not self._context.set_tensor_address(name, buffer.device):
            raise VerificationError(f"TensorRT takes no address for {name!r}: {self._api.last_words()}")

    def _enqueue(self) -> None:
        """Enqueue one call's work on the stream."""
        stream = self._stream
        if stream is None:
            raise InputError("the model is closed")
        for buffer in self._inputs:
            buffer.to_device(stream.handle)
        if not self._context.execute_async_v3(int(stream)):
            raise VerificationError(f"TensorRT does not run the engine: {self._api.last_words()}")
        for buffer in self._outputs:
            buffer.to_host(stream.handle)

    def _record(self, stream: cuda.Stream) -> None:
        """Record one call as a CUDA graph. Some layers (loops, shapes that depend on data) cannot be recorded; each
        call is then enqueued separately."""
        stream.begin()
        try:
            self._enqueue()
            stream.end()
        except VerificationError as error:
            stream.abandon()
            log.info("no CUDA graph: %s", error)
            return
        self._launch = stream.launch
        self.detail += ", CUDA graph"
