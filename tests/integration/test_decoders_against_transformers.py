"""Random tiny models of transformers' own, saved by it and read by Kedge: logits in prefill, chunk and decode, and the
greedy text."""

from __future__ import annotations

import importlib
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from tests.integration.test_decoder_graphs import FLOAT, session_of
from tests.integration.test_encoder_decoder_graphs import session_of as pair_session
from tests.support import decoders, foreign

from kedge.importing.decoders import reading
from kedge_targets.decoder.session import DecoderSession

pytestmark = pytest.mark.campaign

STORIES = Path(__file__).parents[2].parent / "shared" / "data" / "generation" / "stories260k"
_BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
}
_GEMMA = {"head_dim": 32, "sliding_window": 6, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_BASE, "tie_word_embeddings": False}),
    "llama3": ("LlamaConfig", {**_BASE, "tie_word_embeddings": True, "rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {**_BASE, "sliding_window": 6}),
    "qwen2": ("Qwen2Config", _BASE),
    "qwen3": ("Qwen3Config", {**_BASE, "head_dim": 24}),
    "gemma3": ("Gemma3TextConfig", {**_BASE, **_GEMMA, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3Config", {**_BASE, "pad_token_id": 0, "partial_rotary_factor": 0.75}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 64}),
}
DRAWN = 6
"""Drawn configurations of each family."""


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    """The library, from the environment or fetched for the campaign."""
    foreign.importable("transformers", "huggingface-hub", "regex")
    return importlib.import_module("transformers")


def drawn(family: str, seed: int) -> tuple[str, dict[str, Any]]:
    """A configuration of a family with other sizes, heads, windows, scalings and ties than those above."""
    random = np.random.default_rng([zlib.crc32(family.encode()), seed])

    def one_of(*values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    heads, size = one_of(2, 4, 6, 8), one_of(8, 12, 16, 20, 32)
    kind = _MODELS[family][0]
    layers, common = (
        int(random.integers(1, 5)),
        {"vocab_size": one_of(64, 97, 130), "tie_word_embeddings": one_of(True, False)},
    )
    if family == "gpt2":
        own = {
            "n_embd": heads * size,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 48,
            "n_inner": one_of(None, 40),
        }
        return kind, {**common, **own}
    made = {
        **common,
        "hidden_size": heads * size,
        "num_attention_heads": heads,
        "num_key_value_heads": one_of(*(many for many in (1, 2, 3, 4, 6, 8) if heads % many == 0)),
        "num_hidden_layers": layers,
        "intermediate_size": one_of(24, 50, 88),
        "max_position_embeddings": 48,
        "rms_norm_eps": one_of(1e-6, 1e-5, 1e-3),
    }
    if family in ("llama", "llama3", "mistral", "qwen3", "gemma3"):
        made["head_dim"] = one_of(8, 16, 24, 40)
    if family == "llama":
        linear = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}
        made |= {"rope_parameters": one_of(None, linear, {"rope_type": "default", "rope_theta": 77.0})}
        made |= {"attention_bias": one_of(True, False), "mlp_bias": one_of(True, False)}
    if family == "llama3":
        made["rope_parameters"] = {**_LLAMA3, "factor": one_of(2.0, 32.0), "high_freq_factor": one_of(2.0, 4.0)}
    if family == "mistral":
        made["sliding_window"] = one_of(None, 1, 3, 11, 100)
    if family in ("qwen2", "qwen3"):
        made |= {"use_sliding_window": one_of(True, False), "sliding_window": 5, "max_window_layers": one_of(0, 1, 9)}
    if family == "qwen3":
        made["attention_bias"] = one_of(True, False)
    if family == "gemma3":
        made |= {"sliding_window": one_of(2, 7), "query_pre_attn_scalar": one_of(16, 64)}
        made["layer_types"] = [one_of("sliding_attention", "full_attention") for _ in range(layers)]
    if family == "phi3":
        made |= {"pad_token_id": 0, "partial_rotary_factor": one_of(1.0, 0.5), "sliding_window": one_of(None, 6)}
        made |= {"hidden_size": heads * 16}
    return kind, made


def _saved(transformers: ModuleType, kind: str, options: dict[str, Any], folder: Path) -> Any:
    import torch

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**options)).float().eval()
    with torch.no_grad():
        for title, parameter in model.named_parameters():
            if any(part in title for part in ("norm", "bias", "ln_")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    decoders.tokenizer(folder)
    return model


def _logits(model: Any, tokens: list[int]) -> np.ndarray[Any, Any]:
    import torch

    with torch.inference_mode():
        found: np.ndarray[Any, Any] = model(torch.tensor([tokens])).logits[0].numpy()
    return found


def _greedy(session: DecoderSession, prompt: list[int], count: int) -> list[int]:
    session.truncate(0, 0)
    written = [int(session.extend(0, prompt)[0].argmax())]
    while len(written) < count:
        written.append(int(session.step({0: written[-1]})[0].argmax()))
    return written


def _same(transformers: ModuleType, kind: str, options: dict[str, Any], folder: Path) -> None:
    model = _saved(transformers, kind, options, folder / "model")
    tokens = np.random.default_rng(1).integers(3, options["vocab_size"], 18).tolist()
    expected = _logits(model, tokens)
    session = session_of(reading.read(folder / "model"), folder / "made", FLOAT)
    found = [session.extend(0, tokens[:9], keep=9), session.extend(0, tokens[9:12], keep=3)]
    found += [session.step({0: token})[0][None] for token in tokens[12:]]
    assert np.abs(np.concatenate(found) - expected).max() / expected.std() < 1e-5
    text = _greedy(session, tokens[:5], 20)
    assert text == _logits(model, [*tokens[:5], *text])[4:-1].argmax(-1).tolist()


@pytest.mark.parametrize("name", list(_MODELS))
def test_logits_and_greedy_text_are_those_of_transformers(transformers: ModuleType, name: str, tmp_path: Path) -> None:
    _same(transformers, *_MODELS[name], tmp_path)


@pytest.mark.parametrize("seed", range(DRAWN))
@pytest.mark.parametrize("name", list(_MODELS))
def test_drawn_configurations_are_those_of_transformers(
    transformers: ModuleType, name: str, seed: int, tmp_path: Path
) -> None:
    _same(transformers, *drawn(name, seed), tmp_path)


_T5 = {"vocab_size": 96, "d_model": 64, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
_BART = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "vocab_size": 96,
}
_MARIAN = {**_BART, "max_position_embeddings": 64, "pad_token_id": 95, "decoder_start_token_id": 95}
_PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {**_T5, "num_decoder_layers": 3}),
    "t5-gated-untied": (
        "T5Config",
        "T5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "marian": ("MarianConfig", "MarianMTModel", {**_MARIAN, "activation_function": "swish", "scale_embedding": True}),
    "marian-apart": (
        "MarianConfig",
        "MarianMTModel",
        {
            **_MARIAN,
            "decoder_vocab_size": 80,
            "share_encoder_decoder_embeddings": False,
            "pad_token_id": 79,
            "decoder_start_token_id": 79,
        },
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **_BART,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 3,
            "begin_suppress_tokens": None,
        },
    ),
}


def _saved_pair(transformers: ModuleType, name: str, folder: Path) -> Any:
    import torch

    config, kind, options = _PAIRS[name]
    torch.manual_seed(0)
    given = {"decoder_start_token_id": 0, **options} if config == "T5Config" else options
    model = getattr(transformers, kind)(getattr(transformers, config)(**given)).float().eval()
    with torch.no_grad():
        for title, parameter in model.named_parameters():
            if any(part in title for part in ("norm", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif config != "T5Config" and parameter.ndim == 2 and "embed" not in title and "shared" not in title:
                parameter.mul_(3)
        if name == "t5-gated-untied":
            model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.1)
            # Otherwise the library would tie them while saving.
            model.config.tie_word_embeddings = False
        if config == "MarianConfig":
            model.final_logits_bias.add_(torch.randn_like(model.final_logits_bias) * 0.3)
    model.save_pretrained(folder)
    decoders.tokenizer(folder, vocabulary=options.get("decoder_vocab_size", 96))
    return model


@pytest.mark.parametrize("name", list(_PAIRS))
def test_encoder_decoders_are_those_of_transformers(transformers: ModuleType, name: str, tmp_path: Path) -> None:
    import torch

    model = _saved_pair(transformers, name, tmp_path / "model")
    decoder = reading.read(tmp_path / "model")
    source, begin = decoder.text.source, [_PAIRS[name][2].get("decoder_start_token_id", 0)]
    assert source is not None
    assert list(source.begin_tokens) == begin
    random = np.random.default_rng(1)
    if name == "whisper":
        read: Any = random.normal(0, 1, (8, 40)).astype(np.float32)
        given = {"input_features": torch.tensor(read[None])}
    else:
        read = random.integers(3, 70, 13)
        given = {"input_ids": torch.tensor(read[None])}

    def logits(tokens: list[int]) -> np.ndarray[Any, Any]:
        with torch.inference_mode():
            found: np.ndarray[Any, Any] = model(**given, decoder_input_ids=torch.tensor([tokens])).logits[0].numpy()
        return found

    tokens = [*begin, *random.integers(3, 70, 17).tolist()]
    session = pair_session(decoder, tmp_path / "made")
    session.attend(0, read)
    found = [session.extend(0, tokens[:9], keep=9), session.extend(0, tokens[9:12], keep=3)]
    found += [session.step({0: token})[0][None] for token in tokens[12:]]
    expected = logits(tokens)
    assert np.abs(np.concatenate(found) - expected).max() / expected.std() < 1e-5
    text = _greedy(session, begin, 20)
    assert text == logits([*begin, *text])[:-1].argmax(-1).tolist()


def test_features_of_speech_are_those_of_transformers(transformers: ModuleType) -> None:
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    from kedge_protocol.bundle.generation import Source, Speech
    from kedge_targets.pipeline import speech

    how = Speech(rate=16000, frame=400, hop=160, mels=80)
    source = Source(positions=1500, position_bytes=0, begin_tokens=(0,), speech=how)
    samples = np.random.default_rng(2).normal(0, 0.1, 70000).astype(np.float32)
    expected = WhisperFeatureExtractor()._np_extract_fbank_features(np.pad(samples, (0, 410000))[None], "cpu")[0]
    assert np.abs(speech.features(samples, source) - expected).max() < 1e-5


@pytest.mark.shared_data
def test_two_hundred_greedy_tokens_of_stories_are_those_of_transformers(
    transformers: ModuleType, tmp_path: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES).float().eval()
    text = _greedy(session_of(reading.read(STORIES), tmp_path, FLOAT, context=256), [1], 200)
    assert text == _logits(model, [1, *text])[:-1].argmax(-1).tolist()
