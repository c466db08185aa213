"""What users of other programs complain about, each a test of its name: in the field notes and at the places cited."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto
from tests.integration.test_generation import posted
from tests.support import decoders, gguf_files

import kedge
from kedge.importing.decoders import reading
from kedge_agent import Model
from kedge_agent.update import compatibility, events
from kedge_protocol import memory
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import IncompatibleError, InputError, ModelError
from kedge_targets import registry
from kedge_targets.decoder.session import DecoderSession

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
_SIZES: dict[str, Any] = {"vocab_size": 256 + len(_SPECIAL), "max_position_embeddings": 512}
_BACKEND = "onnxruntime"


def bytes_tokenizer(folder: Path) -> None:
    """Replace a folder's tokenizer: a token for each byte, as byte-level BPE has it, so that a character may take four
    tokens."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from tokenizers import decoders as detokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={one: at for at, one in enumerate([*_SPECIAL, *alphabet])}, merges=[]))
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in _SPECIAL])
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = detokenizers.ByteLevel()
    made.save(str(folder / "tokenizer.json"))


def compiled(folder: Path, place: Path, *, quantize: str = "precision=float32") -> Path:
    random = np.random.default_rng(3)
    for name in ("calibration", "evaluation"):
        (place / f"{name}.txt").write_text("".join(chr(40 + at) for at in random.integers(0, 50, 2500)))
    return kedge.compile(
        folder, name="writer", version="1.0", targets=["generic-cpu"], calibration=place / "calibration.txt",
        evaluation=place / "evaluation.txt", out=place / f"out-{folder.name}-{quantize}", quantize=quantize,
        max_perplexity="9x",
    ).path  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("complaints")
    bytes_tokenizer(decoders.folder(path / "model", "llama", template=CHATML, changed=_SIZES))
    return path


@pytest.fixture(scope="module")
def model(place: Path) -> Iterator[Model]:
    with Model(compiled(place / "model", place), target="generic-cpu") as found:
        yield found


def _written(model: Model, regex: str, **options: Any) -> list[str]:
    """The pieces of an answer that is what a regular expression says."""
    return list(model.generate("Say: ", stream=True, regex=regex, max_tokens=300, **options))


def test_complaint_of_characters_cut_in_a_stream(model: Model) -> None:
    """llama.cpp #4036 and #28926, llama-cpp-python #372."""
    text = "🐢 거북이 ✨ é 👩‍👧"
    pieces = _written(model, text)
    assert "".join(pieces) == text
    assert len(pieces) > 5  # they came one by one
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [text]}}}
    body = {"model": "writer", "messages": [{"role": "user", "content": "x"}], "stream": True, "max_tokens": 300}
    events = posted(model, "/v1/chat/completions", {**body, "response_format": form}).stream
    assert events is not None
    chunks = [json.loads(event.decode().removeprefix("data: ")) for event in events if b"[DONE]" not in event]
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert json.loads("".join(said)) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in [*pieces, *said])


def test_complaint_of_stop_strings_that_leak_or_repeat(model: Model) -> None:
    """llama.cpp #10914: several with the same beginning, of which none may be seen, and nothing twice."""
    pieces = _written(model, "an EN ENO ENDE END[.]x{20}", stop=["END.", "ENOUGH", "ENDED"])
    assert "".join(pieces) == "an EN ENO ENDE "
    pieces = _written(model, "aabaac", stop=["aabb", "abc"])
    assert "".join(pieces) == "aabaac"


def test_complaint_of_a_stop_string_found_inside_a_character(model: Model) -> None:
    """shimmy #139: é and è, 🐢 and 🐣 begin with the same bytes."""
    assert "".join(_written(model, "crème 🐣 café 🐢!", stop=["🐢"])) == "crème 🐣 café "
    assert "".join(_written(model, "crème 🐣 brûlé", stop=["é"])) == "crème 🐣 brûl"


def test_complaint_of_a_context_that_shifts(model: Model, place: Path) -> None:
    """llama.cpp #3969 and #9390, llamafile #343: the answer ends with the context, and says so."""
    prompt = "a" * 460
    found = model.generate(prompt, max_tokens=10_000, ignore_end=True)
    assert (found.reason, found.prompt_tokens + len(found.tokens)) == ("length", 512)
    decoder = reading.read(place / "model")
    tokens = [*model.loaded().generator.tokens(prompt), *found.tokens]
    logits = decoders.PlainDecoder(decoder.spec, decoder.weights).logits(tokens)
    assert logits[found.prompt_tokens - 1 : -1].argmax(-1).tolist() == list(found.tokens)
    body = {"model": "writer", "prompt": prompt, "max_tokens": 10_000, "temperature": 0}
    answer = posted(model, "/v1/completions", body)
    assert json.loads(bytes(answer.body))["choices"][0]["finish_reason"] in ("length", "stop")
    refused = posted(model, "/v1/completions", {**body, "prompt": "a" * 600})
    assert (refused.status, json.loads(bytes(refused.body))["error"]["code"]) == (400, "context_length_exceeded")


def test_complaint_of_end_tokens_that_are_overlooked_or_seen(model: Model, place: Path, tmp_path: Path) -> None:
    """text-generation-webui #5885, ollama #2673 and #3759: each of several ends an answer, none is in its text."""
    free = list(model.generate("Say", max_tokens=60, ignore_end=True).tokens)
    first, second = list(dict.fromkeys(free))[2:4]
    folder = decoders.folder(tmp_path / "ends", "llama", template=CHATML, changed=_SIZES)
    bytes_tokenizer(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [second, 2, first]}))
    release = compiled(folder, tmp_path)
    spec = Layout(release).bundle("generic-cpu").config.generation
    assert spec is not None
    assert set(spec.end_tokens) == {2, first, second, _SPECIAL.index("<|im_end|>")}
    with Model(release, target="generic-cpu") as ended:
        found = ended.generate("Say", max_tokens=60)
    assert (found.reason, list(found.tokens)) == ("stop", free[: free.index(first)])


def test_complaint_of_a_template_whose_end_of_turn_ends_nothing(tmp_path: Path) -> None:
    """llama_sdk #8: the configuration names </s>, the template ends its turns otherwise; in a folder and in a GGUF."""
    folder = decoders.folder(tmp_path / "model", "llama", template=CHATML, changed=_SIZES)
    bytes_tokenizer(folder)
    assert reading.read(folder).text.end_tokens == (2, _SPECIAL.index("<|im_end|>"))
    own = CHATML.replace("<|im_end|>", "<s>")  # a token that nobody knows for one
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": own}))
    assert reading.read(folder).text.end_tokens == (1, 2)
    file = gguf_files.write(tmp_path / "model.gguf", "llama", template=own)
    assert reading.read(file).text.end_tokens == (1, 2)


def test_complaint_of_a_chat_without_a_template(tmp_path: Path) -> None:
    """llama_sdk #8: a form that nobody trained the model for is not made up."""
    release = decoders.writer(tmp_path, slots=1)
    with Model(release, target="generic-cpu") as plain:
        with pytest.raises(InputError, match="has no chat template"):
            plain.generate([{"role": "user", "content": "x"}])
        body = {"model": "writer", "messages": [{"role": "user", "content": "x"}]}
        answer = posted(plain, "/v1/chat/completions", body)
        assert answer.status == 400
        assert b"has no chat template" in bytes(answer.body)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "no Jinja"),
        ("{{ raise_exception('never') }}", "never"),
        ("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", "does not end"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_when_the_model_is_read(
    template: str, reason: str, tmp_path: Path
) -> None:
    folder = decoders.folder(tmp_path / "model", "llama", template=template)
    with pytest.raises(ModelError, match=f"the chat template cannot be used: .*{reason}"):
        reading.read(folder)


def test_a_device_with_too_little_memory_refuses_with_the_numbers_before_the_download_and_when_it_loads(
    model: Model, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = model.config
    assert config.generation is not None
    needed = config.resources.memory_bytes
    assert needed > config.generation.cache_bytes == 512 * config.generation.position_bytes
    there = {need.distribution: need.minimum for need in config.runtimes}
    measured = events.Measured(model="writer", digest="", memory_bytes=needed - 1, runtimes=there)
    wanted = rf"needs {needed / 2**20:.1f} MiB of memory, the device has"
    with pytest.raises(IncompatibleError, match=wanted):
        compatibility.require_runtime(config, measured)
    compatibility.require_runtime(config, replace(measured, memory_bytes=needed))
    monkeypatch.setattr(memory, "of_device", lambda: memory.DeviceMemory(needed - 1, needed - 1))
    with pytest.raises(InputError, match=r"the bundle needs \d+ MiB of memory, the device has \d+"):
        Model(place / "out-model-precision=float32", target="generic-cpu")


_WIDE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 8, "num_key_value_heads": 4,
    "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 256,
}  # fmt: skip


def _opened(release: Path, context: int) -> DecoderSession:
    """The packed decoder in one thread, with one slot."""
    layout = Layout(release)
    bundle = layout.bundle("generic-cpu")
    folder = release.parent / f"{release.name}-files"
    folder.mkdir(exist_ok=True)
    for title, layer in bundle.files.items():
        (folder / title).write_bytes(layout.blob_path(layer.digest).read_bytes())
    runtime = registry.runtime(_BACKEND)
    return runtime.load_decoder(folder / bundle.config.entry, {"threads": 1}, slots=1, context=context)


def test_complaint_of_float16_that_is_many_times_slower_than_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime-genai #406 (25 times, on a CPU): halves are what is stored; loading makes them float32, once."""
    release = compiled(
        decoders.folder(tmp_path / "wide", "llama", changed=_WIDE), tmp_path, quantize="precision=float16"
    )
    open_session = onnxruntime.InferenceSession

    def opened(path: str, settings: Any, **options: Any) -> Any:
        settings.optimized_model_filepath = str(tmp_path / "loaded.onnx")
        return open_session(path, settings, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    _opened(release, 256).close()
    stored = onnx.load(next((tmp_path / f"{release.name}-files").glob("*.onnx")))
    loaded = onnx.load(tmp_path / "loaded.onnx", load_external_data=False)
    halves, left = (
        {one.name for one in model.graph.initializer if one.data_type == TensorProto.FLOAT16}
        for model in (stored, loaded)
    )
    assert len(halves) > len(left)
    # Of the embedding only the rows of a step's tokens are turned.
    assert {node.op_type for node in loaded.graph.node if left & set(node.input)} == {"Gather"}


def _step_seconds(session: DecoderSession) -> float:
    """The CPU seconds of one step, of 50."""
    session.truncate(0, 0)
    session.extend(0, [5, 6, 7, 8])
    began = time.thread_time()
    for _ in range(50):
        session.step({0: 9})
    return (time.thread_time() - began) / 50


def test_complaint_of_keys_and_values_that_are_copied_at_each_step(tmp_path: Path) -> None:
    """mobius #369 (12 to 43 times): a step costs what its sequence is long, not what the context could hold."""
    changed = {**_WIDE, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 32_768}
    release = compiled(decoders.folder(tmp_path / "long", "llama", changed=changed), tmp_path)
    sessions = [_opened(release, context) for context in (64, 32_768)]
    taken = np.array([[_step_seconds(session) for session in sessions] for _ in range(7)])
    assert taken[:, 1].min() < 3 * taken[:, 0].min()
