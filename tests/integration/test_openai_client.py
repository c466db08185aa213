"""OpenAI's client, unmodified, against ``kedge-agent serve`` with a language model, and with an encoder."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.test_encoder_decoders import tone, wav
from tests.support import decoders, encoder_decoders
from tests.support.waiting import wait_for

import kedge
from kedge_agent import Model

openai = pytest.importorskip("openai", reason="pip install --no-deps -r constraints/proofs.txt")

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def _served(release: Path, *options: str) -> Iterator[str]:
    """The address of a running ``kedge-agent serve``."""
    command = [
        sys.executable,
        "-u",
        "-m",
        "kedge_agent.cli",
        "serve",
        str(release),
        "--listen",
        "127.0.0.1:0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found, output = None, process.stdout
        assert output is not None
        while found is None:
            line = output.readline()
            assert line, "it ended"
            found = re.search(r"http://127.0.0.1:\d+", line)
        yield found[0]
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release with a random language model of single letters."""
    return decoders.writer(tmp_path_factory.mktemp("openai"), slots=2, template=TEMPLATE)


@pytest.fixture(scope="module")
def address(writer: Path) -> Iterator[str]:
    yield from _served(writer)


@pytest.fixture
def client(address: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as made:
        wait_for(lambda: [one.id for one in made.models.list()] == ["writer"], what="the model serves")
        yield made


def test_an_answer_is_that_of_the_model_itself(client: Any, writer: Path) -> None:
    with Model(writer, target="generic-cpu") as model:
        own = model.generate(HELLO, max_tokens=12)
    made = client.chat.completions.create(model="writer", messages=HELLO, max_tokens=12, temperature=0)
    choice = made.choices[0]
    assert (choice.message.content, choice.finish_reason) == (own.text, own.reason)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (own.prompt_tokens, len(own.tokens))
    text = client.completions.create(model="writer", prompt="Once", max_tokens=5, temperature=0, logprobs=2)
    assert len(text.choices[0].logprobs.tokens) == text.usage.completion_tokens


def test_a_stream_is_the_same_text_with_its_usage_at_the_end(client: Any) -> None:
    options: dict[str, Any] = {"model": "writer", "messages": HELLO, "max_tokens": 12, "seed": 5, "temperature": 1}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_a_client_that_goes_away_frees_its_slot(client: Any) -> None:
    for _ in range(4):  # twice as many as there are slots
        stream = client.completions.create(model="writer", prompt="x", max_tokens=400, stream=True, temperature=1)
        next(iter(stream))
        stream.close()
    assert client.completions.create(model="writer", prompt="x", max_tokens=1).usage.completion_tokens <= 1


def test_answers_keep_to_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
        "required": ["mood", "sure"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": schema}}
    made = client.chat.completions.create(model="writer", messages=HELLO, response_format=form, temperature=1, seed=3)
    found = json.loads(made.choices[0].message.content)
    assert set(found) == {"mood", "sure"}
    assert found["mood"] in ("good", "bad")


def test_what_is_wrong_raises_the_clients_own_errors(client: Any) -> None:
    def asked(**changed: Any) -> None:
        client.chat.completions.create(**{"model": "writer", "messages": HELLO, "max_tokens": 2, **changed})

    with pytest.raises(openai.NotFoundError) as missing:
        asked(model="other")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        asked(messages=[{"role": "user", "content": "a" * 600}])
    assert long.value.code == "context_length_exceeded"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError) as schema:
        asked(response_format=form)
    assert "nonsense" in str(schema.value)
    with pytest.raises(openai.NotFoundError, match="for this there are: none"):
        client.embeddings.create(model="writer", input="a")
    # Its template would leave them out without a word.
    with pytest.raises(openai.BadRequestError, match="takes no tools") as tools:
        asked(tools=[{"type": "function", "function": {"name": "clock"}}])
    assert tools.value.param == "tools"
    with pytest.raises(openai.BadRequestError) as forced:
        asked(tool_choice="required")
    assert forced.value.param == "tool_choice"


def test_errors_before_any_model_is_asked_have_the_apis_form_too(writer: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("s3cret")
    served = _served(writer, "--token-file", str(tmp_path / "token"))
    address = f"{next(served)}/v1"
    asked = {"model": "writer", "prompt": "x"}

    def refused(error: type[Exception], ask: Callable[[Any], object], key: str = "s3cret") -> Any:
        with openai.OpenAI(base_url=address, api_key=key, max_retries=0) as client, pytest.raises(error) as found:
            ask(client)
        wrong: Any = found.value
        assert isinstance(wrong.body["message"], str)
        assert set(wrong.body) == {"message", "type", "param", "code"}
        return wrong

    wrong = refused(openai.AuthenticationError, lambda client: client.models.list(), "another")
    assert (wrong.type, wrong.code) == ("invalid_request_error", "invalid_api_key")
    refused(openai.NotFoundError, lambda client: client.get("/nothing", cast_to=object))
    assert refused(openai.APIStatusError, lambda client: client.put("/models", cast_to=object)).status_code == 405
    broken = {"extra_headers": {"Content-Encoding": "gzip"}}
    refused(openai.BadRequestError, lambda client: client.completions.create(**asked, **broken))
    list(served)


def test_the_asynchronous_client_streams_several_answers_at_once(address: str) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:

            async def one(seed: int) -> str:
                stream = await client.completions.create(
                    model="writer", prompt="x", max_tokens=20, stream=True, seed=seed, temperature=1
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(at) for at in (1, 2, 1, 2)))

    texts = asyncio.run(run())
    assert texts[:2] == texts[2:]
    assert texts[0] != texts[1]


def test_metrics_tell_tokens_first_tokens_queue_and_cache(client: Any, address: str) -> None:
    def read() -> dict[str, float]:
        with urllib.request.urlopen(f"{address}/metrics") as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return {one.name + "".join(f" {v}" for k, v in sorted(one.labels.items()) if k != "model"): one.value
                for family in families for one in family.samples}  # fmt: skip

    client.completions.create(model="writer", prompt="a long beginning", max_tokens=3, temperature=0)
    before = read()
    made = client.completions.create(model="writer", prompt="a long beginning!", max_tokens=7, temperature=0)
    after = read()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    assert grown["kedge_generation_tokens_total"] == made.usage.completion_tokens
    assert grown["kedge_generation_prompt_tokens_total"] == made.usage.prompt_tokens
    assert grown["kedge_generation_cached_tokens_total"] == made.usage.prompt_tokens_details.cached_tokens > 10
    assert grown["kedge_generation_first_token_seconds_count"] == 1
    assert grown[f"kedge_generation_answers_total {made.choices[0].finish_reason}"] == 1
    assert after["kedge_generation_waiting"] == after["kedge_generation_running"] == 0
    assert (
        after["kedge_generation_cache_bytes"] == 2 * 512 * 2 * 3 * 2 * 16 * 4
    )  # slots, positions, k and v, layers, heads


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose pipeline turns a text into a vector: the mean of random vectors of its letters."""
    place = tmp_path_factory.mktemp("encoder")
    decoders.tokenizer(place)
    table = np.random.default_rng(0).normal(0, 1, (decoders.VOCABULARY, 24)).astype(np.float32)
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "length"])
    mask = helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "length"])
    made = helper.make_tensor_value_info("states", TensorProto.FLOAT, ["batch", "length", 24])
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Cast", ["attention_mask"], ["weight"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["weight", "last"], ["column"]),
        helper.make_node("Mul", ["rows", "column"], ["states"]),
    ]
    tensors = [numpy_helper.from_array(table, "table"), numpy_helper.from_array(np.array([-1]), "last")]
    graph = helper.make_graph(nodes, "encoder", [ids, mask], [made], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), place / "model.onnx")
    (place / "lines.txt").write_text(
        "\n".join(f"the {word} is here" for word in ["cat", "dog", "tea", "sea", "sun", "moon", "sand", "wind"])
    )
    return kedge.compile(
        place / "model.onnx",
        name="encoder",
        version="1.0",
        targets=["generic-cpu"],
        calibration=place / "lines.txt",
        evaluation=place / "lines.txt",
        task="embedding",
        quantize="precision=float32",
        out=place / "out",
    ).path


def test_texts_become_the_vectors_that_the_pipeline_gives(encoder: Path) -> None:
    texts = ["a sea of tea", "the sun"]
    with Model(encoder, target="generic-cpu") as model:
        own = [np.asarray(model(text), np.float32) for text in texts]
    for address in _served(encoder):
        with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            wait_for(lambda: [one.id for one in client.models.list()] == ["encoder"], what="the model serves")
            for form in ("float", "base64", None):
                chosen = {} if form is None else {"encoding_format": form}
                made = client.embeddings.create(model="encoder", input=texts, **chosen)
                assert made.usage.prompt_tokens == sum(map(len, texts))
                for one, vector in zip(made.data, own, strict=True):
                    values = one.embedding
                    if isinstance(values, str):
                        values = np.frombuffer(base64.b64decode(values), "<f4")
                    np.testing.assert_allclose(values, vector, rtol=1e-6)
            refused: list[dict[str, Any]] = [{"input": []}, {"input": [1, 2]}, {"input": "", "dimensions": None}]
            with pytest.raises(openai.BadRequestError, match="tokens are not served"):
                client.embeddings.create(model="encoder", input=[[1, 2]])
            for wrong in (*refused, {"input": "a", "dimensions": 8}):
                with pytest.raises(openai.BadRequestError):
                    client.embeddings.create(model="encoder", **wrong)
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="encoder", messages=HELLO)


def test_the_client_gets_transcripts_of_a_model_of_speech(tmp_path: Path) -> None:
    encoder_decoders.folder(tmp_path / "whisper", "whisper")
    (tmp_path / "x.wav").write_bytes(wav(tone(1.0)))
    release = kedge.compile(
        tmp_path / "whisper",
        name="asr",
        version="1.0",
        targets=["generic-cpu"],
        calibration=tmp_path / "x.wav",
        evaluation=tmp_path / "x.wav",
        out=tmp_path / "out",
        quantize="precision=float32",
    )
    with Model(release.path, target="generic-cpu") as model:
        own = model(tmp_path / "x.wav", language="de")
    served = _served(release.path)
    with openai.OpenAI(base_url=f"{next(served)}/v1", api_key="none", max_retries=0) as client:
        wait_for(lambda: [one.id for one in client.models.list()] == ["asr"], what="the model serves")
        options: dict[str, Any] = {"model": "asr", "language": "de"}
        with (tmp_path / "x.wav").open("rb") as file:
            made = client.audio.transcriptions.create(file=file, **options)
        text = client.audio.transcriptions.create(file=tmp_path / "x.wav", response_format="text", **options)
        verbose = client.audio.transcriptions.create(file=tmp_path / "x.wav", response_format="verbose_json", **options)
        assert made.text == text.removesuffix("\n") == verbose.text == own.text
        assert (verbose.language, verbose.duration) == ("de", 1.0)
        assert tuple(verbose.segments[0].tokens) == own.segments[0].tokens
        assert client.audio.translations.create(file=tmp_path / "x.wav", model="asr").text
        with pytest.raises(openai.BadRequestError, match="is no wav file"):
            client.audio.transcriptions.create(file=b"no sound", model="asr")
        with pytest.raises(openai.NotFoundError, match="no model 'asr' for this"):
            client.completions.create(model="asr", prompt="x")
    list(served)
