"""A language model's whole path: compiled, proved, written with in the process and over HTTP as OpenAI's clients do."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import decoders
from tests.support.installed import install

import kedge
from kedge.importing.decoders import reading
from kedge_agent import Model, proving
from kedge_agent.generation.engine import Engine
from kedge_agent.generation.openai import OpenAiHandler
from kedge_agent.serving.handler import Job, Request, Response
from kedge_protocol.errors import BudgetError, ConfigError, DatasetError, InputError, ModelError, TargetError
from kedge_targets.calls import plan as plans
from kedge_targets.proof import ProveRequest, prove

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
)
PROMPT = "Once upon a"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("generation")
    decoders.folder(path / "model", "llama", template=TEMPLATE)
    random = np.random.default_rng(3)
    for name in ("calibration", "evaluation"):
        letters = "".join(chr(40 + at) for at in random.integers(0, 50, 2500))
        (path / f"{name}.txt").write_text(letters)
    return path


def _compiled(place: Path, out: str, model: str = "model", **options: Any) -> kedge.Release:
    return kedge.compile(
        place / model,
        name="writer",
        version="1.0",
        targets=options.pop("targets", ["generic-cpu"]),
        calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt",
        out=place / out,
        **options,
    )


@pytest.fixture(scope="module")
def release(place: Path) -> kedge.Release:
    return _compiled(place, "out", quantize="precision=float32", slots=3)


@pytest.fixture(scope="module")
def model(release: kedge.Release) -> Iterator[Model]:
    with Model(release.path, target="generic-cpu") as found:
        yield found


def test_greedy_text_is_that_of_a_float64_decoder(place: Path, model: Model) -> None:
    decoder = reading.read(place / "model")
    plain = decoders.PlainDecoder(decoder.spec, decoder.weights)
    tokens = model.loaded().generator.tokens(PROMPT)
    wanted: list[int] = []
    for _ in range(24):
        wanted.append(int(plain.logits([*tokens, *wanted])[-1].argmax()))
    found = model.generate(PROMPT, max_tokens=24, ignore_end=True)
    assert list(found.tokens) == wanted
    assert (found.reason, found.prompt_tokens) == ("length", len(tokens))


def test_the_bundle_is_proved_by_its_golden_vectors_and_a_damaged_one_is_not(
    release: kedge.Release, tmp_path: Path
) -> None:
    bundle = release.bundles["generic-cpu"]
    for title, layer in bundle.files.items():
        (tmp_path / title).write_bytes((release.path / "blobs" / "sha256" / layer.digest[7:]).read_bytes())
    (tmp_path / "config").write_bytes(bundle.config_raw)
    request = ProveRequest(folder=str(tmp_path), config=str(tmp_path / "config"))
    answer = prove(request, lambda what, done, total: None)
    assert answer.holds, answer.reason
    assert answer.timing is not None
    data = bytearray((tmp_path / "decoder.bin").read_bytes())
    data[2:4000:4] = bytes(len(data[2:4000:4]))
    (tmp_path / "decoder.bin").write_bytes(data)
    assert not prove(request, lambda what, done, total: None).holds


def test_the_second_turn_reads_only_what_is_new_and_says_the_same(model: Model) -> None:
    first = model.generate("ABCDEFGHIJKLMNOP", max_tokens=3, ignore_end=True)
    again = model.generate("ABCDEFGHIJKLMNOP", max_tokens=3, ignore_end=True)
    assert again.cached_tokens == first.prompt_tokens - 1
    assert again.tokens == first.tokens


def test_answers_at_once_are_those_that_come_alone(model: Model) -> None:
    prompts = ["the cat", "A dog and", "77", "x", "(*)-,.*"]
    alone = [model.generate(one, max_tokens=10, ignore_end=True).tokens for one in prompts]
    streams = [model.generate(one, stream=True, max_tokens=10, ignore_end=True) for one in prompts]
    assert [stream.finish().tokens for stream in streams] == alone


def test_a_seed_repeats_an_answer_and_log_probabilities_belong_to_it(model: Model) -> None:
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 1.2, "ignore_end": True, "log_probabilities": 3}
    one, two = (model.generate(PROMPT, seed=11, **options) for _ in range(2))
    assert one.tokens == two.tokens != model.generate(PROMPT, seed=12, **options).tokens
    assert [token.id for token in one.log_probabilities] == list(one.tokens)
    assert all(len(token.top) == 3 and token.log_probability is not None for token in one.log_probabilities)


def test_an_answer_that_nobody_wants_gives_its_slot_back(model: Model) -> None:
    for _ in range(6):
        stream = model.generate("endless", stream=True, max_tokens=50, ignore_end=True)
        next(iter(stream))
        stream.close()
    assert model.generate("ok", max_tokens=2, ignore_end=True).reason == "length"


def test_pieces_come_without_blocking_the_event_loop(model: Model) -> None:
    async def read() -> str:
        return "".join([piece async for piece in model.generate(PROMPT, stream=True, max_tokens=6, ignore_end=True)])

    assert asyncio.run(read()) == model.generate(PROMPT, max_tokens=6, ignore_end=True).text


@pytest.mark.parametrize(
    ("prompt", "options", "reason"),
    [
        ("a" * 80, {}, "the prompt has 81 tokens, the context 64"),
        ([{"content": "no role"}], {}, "has no role"),
        ("a", {"max_tokens": 0}, "max_tokens: is not a whole number from 1 on"),
        ("a", {"max_tokens": 2.5}, "max_tokens: is not a whole number"),
        ("a", {"seconds": "1"}, "seconds: is not a number"),
        ("a", {"log_probabilities": "2"}, "log_probabilities: is not a whole number"),
        ("a", {"seed": 1.5}, "seed is no whole number"),
        ("\ud800", {}, "prompt: the text holds half a character"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], {}, r"messages\[0\].content: is neither a text nor"),
        ("a", {"temperature": -1}, "temperature is below 0"),
        (None, {}, "prompt: is neither a text nor a list of messages"),
        (b"a", {}, "prompt: is neither a text nor a list of messages"),
        ("a", {"stop": [""]}, "stop: is not up to 16 texts, none of them empty"),
        ("a", {"stop": 5}, "stop: is not up to 16 texts"),
        (
            "a",
            {"no_such_option": 1},
            "'no_such_option' is not known to this model. Known are .*json_schema",
        ),
    ],
)
def test_what_cannot_be_answered_is_an_error_at_once(model: Model, prompt: Any, options: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        model.generate(prompt, **options)


def test_messages_may_come_in_parts(model: Model) -> None:
    parts = [{"type": "text", "text": "ab"}, {"type": "text", "text": "cd"}]
    texts = [
        model.generate([{"role": "user", "content": content}], max_tokens=5, ignore_end=True).tokens
        for content in ("abcd", parts)
    ]
    assert texts[0] == texts[1]


def test_an_answer_that_cannot_begin_is_told_and_the_next_one_is_written(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> bool:
        raise RuntimeError("no such state")

    fail = Engine._fail

    def slowly(engine: Engine, error: Exception) -> None:
        # Who is told asks again before the engine has looked at who else waits.
        time.sleep(0.2)
        fail(engine, error)

    monkeypatch.setattr(Engine, "_fail", slowly)
    with monkeypatch.context() as broken:
        broken.setattr(Engine, "_begin", fails)
        with pytest.raises(InputError, match="no such state"):
            model.generate("a")
    assert model.generate("a", max_tokens=1, ignore_end=True).tokens


def test_an_answer_ends_where_the_context_does_and_never_shifts_it(model: Model) -> None:
    found = model.generate("a" * 50, max_tokens=1000, ignore_end=True)
    assert found.reason == "length"
    assert found.prompt_tokens + len(found.tokens) == 64


def test_arrays_are_refused_by_a_model_that_writes(model: Model) -> None:
    with pytest.raises(InputError, match=r"Model\.generate"):
        model(np.zeros((1, 4), np.int64))


class _Pool:
    """The serving child's models, as far as the handler asks."""

    scanned = True

    def __init__(self, model: Model) -> None:
        self._model = model

    def names(self) -> list[str]:
        return ["writer"]

    def get(self, name: str) -> Any:
        return type("Entry", (), {"model": self._model}) if name == "writer" else None


def posted(model: Model, path: str, body: dict[str, Any]) -> Response:
    """What the serving process answers."""
    handler = OpenAiHandler(_Pool(model))  # type: ignore[arg-type]
    job = handler.route(Request(method="POST", path=path, body=json.dumps(body).encode()))
    assert isinstance(job, Job)
    return job.run()


def _body(response: Response) -> Any:
    assert isinstance(response.body, bytes)
    return json.loads(response.body)


def test_a_chat_completion_whole_and_streamed_are_the_same(model: Model) -> None:
    request = {
        "model": "writer",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        "temperature": 0,
        "max_tokens": 9,
    }
    whole = _body(posted(model, "/v1/chat/completions", request))
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert whole["usage"]["completion_tokens"] == 9 or whole["choices"][0]["finish_reason"] == "stop"
    streamed = posted(
        model, "/v1/chat/completions", {**request, "stream": True, "stream_options": {"include_usage": True}}
    )
    assert streamed.stream is not None
    events = [event.decode().removeprefix("data: ").strip() for event in streamed.stream]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"])
    assert text == message["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]


def test_tools_reach_the_template_unless_none_may_be_chosen(model: Model) -> None:
    tools = [{"type": "function"}]

    def read(**more: Any) -> int:
        request = {"model": "writer", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **more}
        return int(_body(posted(model, "/v1/chat/completions", request))["usage"]["prompt_tokens"])

    assert read(tools=tools) == read() + len(json.dumps(tools))
    assert read(tools=tools, tool_choice="none") == read(tools=[]) == read()


def test_completions_take_texts_and_tokens_and_tell_log_probabilities(model: Model) -> None:
    request = {"model": "writer", "prompt": ["ab", "ab"], "temperature": 0, "max_tokens": 4, "logprobs": 2, "n": 2}
    found = _body(posted(model, "/v1/completions", request))
    assert len({choice["text"] for choice in found["choices"]}) == 1
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    logs = found["choices"][0]["logprobs"]
    assert len(logs["tokens"]) == len(logs["token_logprobs"]) == len(logs["top_logprobs"])
    text = found["choices"][0]["text"]
    ends = [*logs["text_offset"][1:], len(text)]
    assert [text[at:to] for at, to in zip(logs["text_offset"], ends, strict=True)] == logs["tokens"]


@pytest.mark.parametrize(
    ("change", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "prompt"),
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"modalities": ["text", "audio"]}, 400, "modalities"),
        ({"n": 99}, 400, "n"),
        ({"presence_penalty": 1}, 400, "presence_penalty"),
        ({"response_format": {"type": "grammar"}}, 400, "response_format"),
        ({"response_format": {"type": "json_schema"}}, 400, "response_format"),
        ({"stop": ["a"] * 5}, 400, "stop"),
        ({"stream": "yes"}, 400, "stream"),
        ({"messages": [{"role": "user", "content": "a" * 200}]}, 400, None),
    ],
)
def test_a_request_that_is_wrong_is_refused_by_its_parameter(
    model: Model, change: dict[str, Any], status: int, param: str | None
) -> None:
    request = {"model": "writer", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2, **change}
    response = posted(model, "/v1/chat/completions", request)
    assert response.status == status
    assert _body(response)["error"]["param"] == param


def test_the_budget_decides_and_what_breaks_it_is_told(place: Path) -> None:
    found = _compiled(place, "kept", max_kl=0.002)
    assert found.generation is not None
    entry = found.generation.targets[0]
    assert len(entry.attempts) > 1
    assert entry.attempts[0].broken.startswith("KL")
    assert entry.attempt.figures.kl <= 0.002
    with pytest.raises(BudgetError, match=r"KL .* is over 1e-09"):
        _compiled(place, "none", max_kl=1e-9, quantize="precision=int4")
    assert not (place / "none").exists()


def test_limits_of_bytes_and_pace_decide_too(place: Path) -> None:
    found = _compiled(place, "limits", max_size="90k", max_memory="1MB", min_tokens_per_second=1e-3)
    assert found.generation is not None
    entry = found.generation.targets[0]
    assert entry.bytes + (place / "model" / "tokenizer.json").stat().st_size <= 90_000
    assert entry.memory_bytes == entry.attempt.memory_bytes <= 1_000_000
    assert entry.written_per_second is not None
    assert entry.written_per_second > 1e-3
    attempts = len(entry.attempts)
    # What is too large ends the search: schemes with more bits are larger still.
    for options, reason in (
        ({"max_size": "70k"}, r"files of .* MB are over 0\.07 MB\. Allow more bytes"),
        ({"max_size": "0.3x"}, r"files of .* MB are over"),
        ({"max_memory": "150k"}, r"memory of .* MB are over 0\.15 MB"),
        ({"max_kl": 1e-6, "max_size": "90k"}, r"the nearest, float16: files of .* MB are over 0\.09 MB"),
        ({"min_tokens_per_second": 1e9}, r"writes .* tokens a second, 1e\+09 are wanted\. Ask for fewer"),
    ):
        with pytest.raises(BudgetError, match=reason):
            _compiled(place, "none", **options)
    assert attempts == 1
    assert not (place / "none").exists()


def test_schemes_that_differ_in_the_embedding_alone_learn_their_layers_once(place: Path) -> None:
    heard: list[str] = []
    found = _compiled(place, "once", max_kl=0.002, progress=lambda who, what, done, total: heard.append(what))
    assert found.generation is not None
    first, second = found.generation.targets[0].attempts[:2]
    assert first.scheme.same_layers(second.scheme)
    assert first.scheme.label in heard
    assert f"evaluate {second.scheme.label}" in heard
    assert second.scheme.label not in heard
    assert second.figures.kl < first.figures.kl


@pytest.mark.parametrize(
    ("options", "kind", "reason"),
    [
        ({"targets": ["jetson-orin"], "max_kl": -1}, (ConfigError, TargetError), "divergence|unknown target"),
        ({"targets": ["ncs2"]}, TargetError, "'ncs2' runs no decoders"),
        ({"context": 1000}, ConfigError, "1000 positions are more than the model's 64"),
        ({"slots": 30_000_000}, TargetError, "the target has"),
        ({"max_perplexity": "much"}, ConfigError, "is no limit"),
        ({"quantize": "precision=int3"}, ConfigError, "'int3' is not known"),
        ({"quantize": "cache=int4"}, ConfigError, "int4. is not known"),
        ({"quantize": "int8_layers=7"}, ConfigError, "layer 7 is not among the model's 3"),
        ({"cache": "int4"}, ConfigError, "int4. is not known"),
        ({"max_size": "1k"}, BudgetError, r"files of .* are over 0\.001 MB in int4 .* already"),
        ({"max_memory": "20k", "slots": 2}, BudgetError, r"memory of .* are over 0\.02 MB in int4 .* already"),
        ({"max_memory": "200k", "quantize": "precision=float32"}, BudgetError, r"are over 0\.2 MB in float32 already"),
        ({"max_size": "big"}, ConfigError, "--max-size: 'big' is no size"),
        ({"max_memory": "big"}, ConfigError, "--max-memory: 'big' is no size"),
        ({"min_tokens_per_second": 0}, ConfigError, "0 is no pace"),
        ({"min_tokens_per_second": 5, "targets": ["rpi4"]}, ConfigError, "rpi4 is aarch64"),
        ({"max_memory": "1MB", "split": 2}, ConfigError, "--max-memory: has no place beside --split"),
    ],
)
def test_what_cannot_be_compiled_is_told_before_the_work(place: Path, options: Any, kind: Any, reason: str) -> None:
    with pytest.raises(kind, match=reason):
        _compiled(place, "refused", **options)
    assert not (place / "refused").exists()


def test_damaged_folders_are_told_by_what_is_wrong(place: Path, tmp_path: Path) -> None:
    def changed(name: str) -> Path:
        return decoders.folder(tmp_path / name, "qwen2", shards=2)

    (changed("tokenizer") / "tokenizer.json").unlink()
    shard = changed("shard") / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-64])
    (changed("missing") / "model-00001-of-00002.safetensors").unlink()
    for name, key, value in (
        ("experts", "num_experts", 8),
        ("scaling", "rope_scaling", {"rope_type": "yarn", "factor": 2}),
        ("family", "model_type", "mamba"),
        ("activation", "hidden_act", "relu2"),
    ):
        path = changed(name) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value, "architectures": ["XForCausalLM"]}))
    for name, reason in {
        "tokenizer": "holds no tokenizer.json",
        "shard": "is cut short: the tensor",
        "missing": "the shard model-00001-of-00002.safetensors is missing",
        "experts": "num_experts = 8 is not supported",
        "scaling": "'yarn' is not supported",
        "family": "model_type 'mamba' is not read",
        "activation": "'relu2' is not known",
    }.items():
        with pytest.raises(ModelError, match=reason):
            reading.read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "holds weights and no config.json"),
        ("config.json", "{", "config.json: cannot be read"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0, "hidden_size": 32}', "a size is 0"),
        ("../model.gguf", "", "GGUF"),
        ("../model.gguf", "GGUF", "GGUF"),
    ],
)
def test_what_is_no_model_is_told_before_options_of_language_models_are(
    place: Path, tmp_path: Path, name: str, content: str | None, reason: str
) -> None:
    model = decoders.folder(tmp_path / "model", "llama")
    path = (model / name).resolve()
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    source = path if path.suffix == ".gguf" else model
    with pytest.raises(ModelError, match=reason):
        _compiled(place, "refused", model=str(source), slots=2)


def test_an_adapter_is_merged_as_its_formula_says(tmp_path: Path) -> None:
    base = decoders.folder(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    random = np.random.default_rng(5)
    down, up = random.normal(size=(2, 32)).astype(np.float32), random.normal(size=(32, 2)).astype(np.float32)
    stem = "base_model.model.model.layers.1.self_attn.q_proj.lora_"
    tensors = {f"{stem}A.weight": down, f"{stem}B.weight": up}
    decoders.write_tensors(adapter / "adapter_model.safetensors", tensors)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    before, after = reading.read(base).weights, reading.read(base, adapter=adapter).weights
    assert np.allclose(after.layer(1)["q"], before.layer(1)["q"] + 4 * up @ down, atol=1e-5)
    assert np.array_equal(after.layer(0)["q"], before.layer(0)["q"])


def test_texts_that_hold_nothing_are_an_error(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="holds no text"):
        kedge.compile(
            place / "model",
            name="writer",
            version="1.0",
            targets=["generic-cpu"],
            calibration=tmp_path / "empty",
            evaluation=place / "evaluation.txt",
            out=tmp_path / "out",
        )


def test_how_a_decoder_is_run_is_chosen_when_it_is_proved_and_followed(
    release: kedge.Release, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = install(tmp_path / "state", release.path)
    slot, cache = folder.current(), folder.cache
    assert slot is not None
    assert cache is not None
    config = slot.bundle().config
    with caplog.at_level(logging.INFO, logger="kedge_agent"):
        proving.prove(slot.folder, config, proving.ProofLimits(), cache, lambda line: None)
    assert "could not be compared" not in caplog.text
    plan = plans.read(cache, config)
    assert plan is not None
    assert len({one.options["threads"] for one in plan.measured}) == len(plans.numbers_of_threads(plan.cores))
    assert plan.options in [one.options for one in plan.measured]
    with Model("writer", state=folder.state) as followed, Model(release.path, target="generic-cpu") as plain:
        assert followed.figures["call_threads"] == plan.options["threads"]
        assert followed.generate(PROMPT, max_tokens=12).text == plain.generate(PROMPT, max_tokens=12).text
