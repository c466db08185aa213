"""Folders of language models as people have them: what lies beside the model changes nothing, and what the model cannot
do with is an error that names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support import decoders
from tokenizers import AddedToken, Tokenizer

from kedge.compiler.decoders.worker_parts import check_tokenizer
from kedge.evaluation.decoders import texts
from kedge.importing import model_kinds
from kedge.importing.decoders import gguf_text, reading
from kedge_protocol.errors import ConfigError, ModelError
from kedge_targets.decoder import tokenizing

_TEMPLATE = {"Sequence": {"id": "A", "type_id": 0}}
_BEGIN = {"SpecialToken": {"id": "<s>", "type_id": 0}}
_BEGINNING = {
    "type": "TemplateProcessing",
    "single": [_BEGIN, _TEMPLATE],
    "pair": [_BEGIN, _TEMPLATE, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}
_PLAIN = {**_BEGINNING, "single": [_TEMPLATE], "special_tokens": {}, "pair": _BEGINNING["pair"][1:]}  # type: ignore[index]
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def _changed(path: Path, **keys: Any) -> None:
    """Write other values into a JSON file; None takes a key away."""
    found = {**json.loads(path.read_text()), **keys}
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))


@pytest.mark.parametrize(
    ("processor", "begins"),
    [
        (_BEGINNING, True),  # Llama 2, TinyLlama
        ({"type": "Sequence", "processors": [_BYTES, _BEGINNING]}, True),  # Llama 3
        (_PLAIN, False),
        (_BYTES, False),  # Qwen2, SmolLM2, GPT-2: there is a bos_token_id all the same
    ],
)
def test_a_text_begins_as_its_tokenizer_has_it(tmp_path: Path, processor: dict[str, Any], begins: bool) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    _changed(folder / "tokenizer.json", post_processor=processor)
    _changed(folder / "tokenizer_config.json", add_bos_token=None)
    text = reading.read(folder).text
    tokenizer = Tokenizer.from_str(text.tokenizer.decode())
    plain, whole = (tokenizer.encode("a", add_special_tokens=one).ids for one in (False, True))
    assert whole == ([] if text.begin_token is None else [text.begin_token]) + plain
    assert (text.begin_token == 1) is begins


@pytest.mark.parametrize(("said", "begin"), [(True, 1), (False, None), (None, None)])
def test_a_tokenizer_that_does_not_say_how_texts_begin_is_asked_for_its_settings(
    tmp_path: Path, said: bool | None, begin: int | None
) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    _changed(folder / "tokenizer_config.json", add_bos_token=said)
    assert reading.read(folder).text.begin_token == begin


def test_a_text_is_never_cut_off_or_filled_up_as_those_of_the_training_were(tmp_path: Path) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained.enable_truncation(16)
    trained.enable_padding(length=32)
    trained.save(str(folder / "tokenizer.json"))
    assert len(trained.encode("a" * 100)) == 32
    raw = reading.read(folder).text.tokenizer
    for length in (3, 100):
        for tokenizer in (tokenizing.opened(folder / "tokenizer.json"), texts.tokenizer(raw, where="model")):
            assert len(tokenizer.encode("a" * length)) == length


@pytest.mark.parametrize(
    ("kind", "split", "said", "begin"),
    [
        ("gpt2", "llama-bpe", None, 1),  # Llama 3's files do not say it; llama.cpp knows it
        ("gpt2", "smollm", None, None),
        ("gpt2", "qwen2", False, None),
        ("gpt2", "llama-bpe", False, None),
        ("llama", "default", None, 1),
    ],
)
def test_a_text_begins_as_in_llama_cpp(kind: str, split: str, said: bool | None, begin: int | None) -> None:
    fields = {
        "tokenizer.ggml.model": kind,
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
        "tokenizer.ggml.token_type": [3, 3, 3, 1],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if said is not None:
        fields["tokenizer.ggml.add_bos_token"] = said
    assert gguf_text.text_of(fields, "model.gguf").begin_token == begin


@pytest.mark.parametrize(("split", "tokens"), [("llama-bpe", ["abc"]), ("qwen2", ["ab", "c"])])
def test_a_word_that_is_a_token_of_llama_3_is_not_merged_of_others(split: str, tokens: list[str]) -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": split,
        "tokenizer.ggml.tokens": ["a", "b", "c", "ab", "abc"],
        "tokenizer.ggml.merges": ["a b"],
    }
    tokenizer = tokenizing.opened(gguf_text.text_of(fields, "model.gguf").tokenizer)
    assert tokenizer.encode("abc").tokens == tokens


def test_decomposed_letters_are_those_of_qwen_2_in_gguf_too() -> None:
    letters = [
        "e",
        "\u00c3",
        "\u00a9",
        "\u00cc",
        "\u0123",
    ]  # the bytes of two forms of one letter, as GPT-2 writes them
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.tokens": letters}
    tokenizer = tokenizing.opened(gguf_text.text_of(fields, "model.gguf").tokenizer)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids == [1, 2]


def test_what_lies_beside_a_model_changes_nothing(tmp_path: Path) -> None:
    folder = decoders.folder(tmp_path / "model", "qwen2", template="{{ messages[0].content }}")
    other = shutil.copytree(folder, tmp_path / "other")
    before = reading.read(other)
    for name in (".git/lfs/objects/ab", ".cache/huggingface/download/config.json.metadata"):
        (other / name).parent.mkdir(parents=True)
        (other / name).write_bytes(b"\x00" * 4096)
    assert reading.read(other).source_digest == before.source_digest == reading.read(folder).source_digest

    # The same model as other versions of transformers write it: tied weights twice, the template in a file of its own.
    tensors = {"lm_head.weight": before.weights.outer("embedding")}
    whole = folder / "model.safetensors"
    whole.rename(folder / "model-00001-of-00002.safetensors")
    decoders.write_tensors(folder / "model-00002-of-00002.safetensors", tensors)
    named = {name: whole.with_name("model-00001-of-00002.safetensors").name for name in _names(folder)}
    index = {"weight_map": {**named, "lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    _changed(folder / "tokenizer_config.json", chat_template=None)
    _changed(folder / "config.json", dtype="float32", torch_dtype="bfloat16", use_cache=True, quantization_config=None)
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + (folder / "config.json").read_bytes())  # as Windows does
    for name in ("pytorch_model.bin", "README.md", ".gitattributes", "onnx/model.onnx", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not read")
    after = reading.read(folder)
    assert after.spec == before.spec
    assert after.text == before.text
    for name, array in before.weights.layer(1).items():
        assert np.array_equal(array, after.weights.layer(1)[name])


def _names(folder: Path) -> set[str]:
    raw = (folder / "model-00001-of-00002.safetensors").read_bytes()
    return set(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "sub/model.safetensors", ".."])
def test_an_index_reads_no_file_outside_its_folder(tmp_path: Path, shard: str) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "sub").mkdir()
    shutil.copy(tmp_path / "outside.safetensors", folder / "sub" / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match=r"no plain file name|is missing"):
        reading.read(folder)


def test_a_folder_that_holds_the_model_further_down_is_told_what_to_give(tmp_path: Path) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    (folder / "model.safetensors").rename(folder / "model-Q4_0.gguf")
    with pytest.raises(ModelError, match=r"Give a file in it, as model-Q4_0\.gguf"):
        reading.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"Give a file in it, as model-Q4_0\.gguf"):
        model_kinds.recognise(str(folder))
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is an adapter without its model"):
        model_kinds.recognise(str(folder))
    (tmp_path / "models--a--b" / "snapshots" / "0").mkdir(parents=True)
    with pytest.raises(ModelError, match="give the folder below snapshots"):
        model_kinds.recognise(str(tmp_path / "models--a--b"))


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors"])
def test_a_quantized_checkpoint_is_refused_by_its_key(tmp_path: Path, method: str) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    _changed(folder / "config.json", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(ModelError, match=f"quantization_config = .*{method}.* is not supported"):
        reading.read(folder)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("tokenizer.json", b'{"model": {}, "post_processor": {"type": "TemplateProcessing"}}', "post-processor"),
        ("tokenizer.json", b'{"model": {}, "post_processor": "none"}', "post-processor"),
    ],
)
def test_a_damaged_text_side_is_told(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    folder = decoders.folder(tmp_path / "model", "llama")
    (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=reason):
        reading.read(folder)


def test_a_token_that_no_text_needs_may_lie_beside_the_vocabulary(tmp_path: Path) -> None:
    text = reading.read(decoders.folder(tmp_path / "model", "llama")).text
    tokenizer = Tokenizer.from_str(text.tokenizer.decode())
    size = tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([AddedToken("<image_soft_token>", special=True)])  # Gemma 3's
    check_tokenizer(tokenizer, text, size, where="model")
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    asked = text.__class__(**{**text.__dict__, "template": "{{ messages[0].content }}<|im_end|>"})
    with pytest.raises(ConfigError, match=f"the tokenizer has {size + 2} tokens, the model {size}"):
        check_tokenizer(tokenizer, asked, size, where="model")
    with pytest.raises(ConfigError, match="tokens, the model"):
        check_tokenizer(tokenizer, text, size - 1, where="model")


@pytest.mark.parametrize(
    ("key", "value", "rows", "reason"),
    [
        ("init_lora_weights", "pissa", 32, "init_lora_weights = 'pissa' is not supported"),
        ("alora_invocation_tokens", [5, 6], 32, "alora_invocation_tokens"),
        ("lora_dropout", 0.1, 16, "layer 1, q: the adapter is for 16 x 32, the model has"),
        ("lora_dropout", 0.1, 32, None),
    ],
)
def test_an_adapter_that_another_formula_or_model_needs_is_refused(
    tmp_path: Path, key: str, value: Any, rows: int, reason: str | None
) -> None:
    base = decoders.folder(tmp_path / "base", "llama")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    stem = "base_model.model.model.layers.{}.self_attn.q_proj.lora_"
    tensors = {}
    for layer, size in ((0, 32), (1, rows)):
        tensors[f"{stem.format(layer)}A.weight"] = np.ones((2, 32), np.float32)
        tensors[f"{stem.format(layer)}B.weight"] = np.ones((size, 2), np.float32)
    decoders.write_tensors(adapter / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "init_lora_weights": True, key: value}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    if reason is None:
        assert reading.read(base, adapter=adapter).source_digest != reading.read(base).source_digest
        return
    with pytest.raises(ModelError, match=reason):
        reading.read(base, adapter=adapter)
