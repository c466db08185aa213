"""Sends golden samples through the served endpoint, in the worker; see :mod:`kedge_agent.served_endpoint`.

The calls carry the header field :data:`kedge_agent.serving.handler.GOLDEN_FIELD`, so that they are counted nowhere.
"""

from __future__ import annotations

import http
import http.client
import io
import json
import ssl
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from kedge_agent.served_endpoint import Endpoint, EndpointAnswer, EndpointRequest
from kedge_agent.serving import binary_tensors
from kedge_agent.serving.datatypes import Array, datatype_of
from kedge_agent.serving.handler import GOLDEN_FIELD
from kedge_agent.serving.settings import ServerSettings
from kedge_agent.slots import ModelFolder
from kedge_protocol import addresses, digest, golden, tensors
from kedge_protocol.bundle.config import BundleConfig
from kedge_protocol.errors import EndpointError, VerificationError
from kedge_targets import proof
from kedge_targets.decoder import golden as decoders
from kedge_targets.worker.progress import Progress


def ask(request: EndpointRequest, progress: Progress) -> EndpointAnswer:
    """Worker task; see :func:`kedge_agent.served_endpoint.knock`."""
    folder = ModelFolder(Path(request.state), request.model)
    slot = folder.current()
    if slot is None or slot.digest != request.digest:
        raise EndpointError("another bundle is current", where=request.model)
    config = slot.bundle().config
    digest.verify_file(slot.folder / config.golden.file, config.golden.digest)
    if request.endpoint.address is None:
        return EndpointAnswer(samples=_ask_model(folder, request.digest, config, slot.folder, progress))
    client = _Client(request.endpoint, request.endpoint.address)
    client.require(request.model, request.digest)
    samples = _ask_http(client, config, slot.folder, progress)
    client.require(request.model, request.digest)
    return EndpointAnswer(samples=samples)


def _ask_http(client: _Client, config: BundleConfig, slot: Path, progress: Progress) -> int:
    if config.generation is not None:
        return _written(
            slot, config, lambda tokens: client.write(config.name, tokens), lambda: client.hear(config.name)
        )
    return _compared(slot, config, lambda inputs: client.infer(config, inputs), progress)


def _ask_model(folder: ModelFolder, bundle: str, config: BundleConfig, slot: Path, progress: Progress) -> int:
    from kedge_agent.model import Model

    with Model(folder.name, state=folder.state) as model:
        loaded = model.loaded()
        if loaded.digest != bundle:
            raise EndpointError("another bundle answers", where=folder.name)
        if config.generation is not None:

            def write(tokens: list[int]) -> object:
                prompt, options = loaded.generator.from_tokens(tokens)
                return loaded.begin(prompt, counted=False, max_tokens=1, **options).finish()

            return _written(slot, config, write, lambda: loaded.answer(_silence(), {}))

        def infer(inputs: Mapping[str, Array]) -> dict[str, Array]:
            answer = loaded.answer(inputs, {})
            return answer if isinstance(answer, dict) else {config.outputs[0].name: answer}

        return _compared(slot, config, infer, progress)


def _compared(
    slot: Path,
    config: BundleConfig,
    infer: Callable[[Mapping[str, Array]], Mapping[str, Array]],
    progress: Progress,
) -> int:
    """Compare all golden vectors.

    Args:
        infer: answers the model's inputs in its own axes.
    """

    def answer(samples: Mapping[str, Array]) -> dict[str, Array]:
        made = infer({spec.name: tensors.from_batch_first(samples[spec.name], spec) for spec in config.inputs})
        if missing := [spec.name for spec in config.outputs if spec.name not in made]:
            raise VerificationError(f"output {missing[0]!r} is missing")
        return {spec.name: tensors.to_batch_first(made[spec.name], spec) for spec in config.outputs}

    found, _ = proof.run_vectors_through(slot, config, answer, progress)
    golden.require(found, where=f"{config.name} {config.version}")
    return config.golden.samples


def _written(slot: Path, config: BundleConfig, write: Callable[[list[int]], object], hear: Callable[[], object]) -> int:
    """Let a language model continue its golden tokens, or read its golden sources; a model of speech hears silence.
    Logits do not come through the endpoint: that it answers is all that is asked, and the proof before the switch
    compares them. Of a part not even that: the other devices may get theirs later."""
    if config.generation is not None and config.generation.part is not None:
        return config.golden.samples
    tokens, _, sources = decoders.inputs(golden.load(slot / config.golden.file), where=config.golden.file)
    if sources is not None and sources.dtype.kind == "f":
        hear()
        return 1
    for row in (tokens if sources is None else sources).tolist():
        write(row)
    return len(tokens)


def _silence() -> bytes:
    """Return a wav file of half a second."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(16000))
    return content.getvalue()


class _Client:
    """Speaks to the serving process as users do.

    Raises:
        ConfigError: the token cannot be read.
    """

    def __init__(self, endpoint: Endpoint, address: str) -> None:
        host, port = addresses.parse(address, where="serve.listen")
        self._host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        self._port = port
        self._seconds = endpoint.call_seconds
        self._context = None if endpoint.certificate is None else _trusting(endpoint.certificate)
        token = ServerSettings(token_file=endpoint.token_file).token()
        self._fields = {GOLDEN_FIELD: "1"}
        if token is not None:
            self._fields["Authorization"] = f"Bearer {token.decode()}"

    def require(self, model: str, bundle: str) -> None:
        """Raise :class:`EndpointError` unless this bundle answers."""
        described = self._json("GET", f"/v2/models/{quote(model)}")
        found = described.get("parameters", {}).get("digest") if isinstance(described, dict) else None
        if found != bundle:
            raise EndpointError(f"answers with another bundle ({str(found)[:19]})", where=model)

    def infer(self, config: BundleConfig, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Return the outputs for inputs in the model's own axes."""
        described, parts = [], []
        for name, array in inputs.items():
            raw = bytes(binary_tensors.bytes_of(np.asarray(array)))
            size = {"binary_data_size": len(raw)}
            kind = datatype_of(array)
            described.append({"name": name, "datatype": kind, "shape": list(array.shape), "parameters": size})
            parts.append(raw)
        head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
        fields = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
        raw, length = self._call("POST", f"/v2/models/{quote(config.name)}/infer", b"".join((head, *parts)), fields)
        return _outputs(raw, length)

    def write(self, model: str, tokens: list[int]) -> None:
        """Let a language model continue these tokens by one."""
        self._json("POST", "/v1/completions", json.dumps({"model": model, "prompt": tokens, "max_tokens": 1}).encode())

    def hear(self, model: str) -> None:
        """Let a model of speech write down half a second of silence."""
        mark = "kedge"
        parts = [f'--{mark}\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'.encode()]
        parts.append(f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="x.wav"\r\n\r\n'.encode())
        body = b"".join((*parts, _silence(), f"\r\n--{mark}--\r\n".encode()))
        fields = {"Content-Type": f"multipart/form-data; boundary={mark}"}
        self._call("POST", "/v1/audio/transcriptions", body, fields)

    def _json(self, method: str, path: str, body: bytes | None = None) -> Any:
        return json.loads(self._call(method, path, body, {"Content-Type": "application/json"})[0])

    def _call(self, method: str, path: str, body: bytes | None, fields: Mapping[str, str]) -> tuple[bytes, str | None]:
        where = f"{method} {addresses.join(self._host, self._port)}{path}"
        connection = self._connection()
        try:
            connection.request(method, path, body, {**self._fields, **fields})
            response = connection.getresponse()
            raw = response.read()
        except (OSError, http.client.HTTPException) as error:
            raise EndpointError(f"the served endpoint does not answer: {error}", where=where) from error
        finally:
            connection.close()
        if response.status != http.HTTPStatus.OK:
            words = raw[:300].decode(errors="replace")
            raise EndpointError(f"the served endpoint answers {response.status}: {words}", where=where)
        return raw, response.getheader("Inference-Header-Content-Length")

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=self._seconds)
        return http.client.HTTPSConnection(self._host, self._port, timeout=self._seconds, context=self._context)


def _trusting(certificate: str) -> ssl.SSLContext:
    """Return a context that trusts this very certificate, whoever issued it, and whatever name it has: it is this
    device's own."""
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _outputs(raw: bytes, length: str | None) -> dict[str, Array]:
    head = len(raw) if length is None else int(length)
    rest, at, outputs = memoryview(raw)[head:], 0, {}
    for output in json.loads(raw[:head])["outputs"]:
        size = output["parameters"]["binary_data_size"]
        shape = tuple(output["shape"])
        where = f"output {output['name']!r}"
        outputs[output["name"]] = binary_tensors.array_of(rest[at : at + size], output["datatype"], shape, where=where)
        at += size
    return outputs
