"""Translators and models of speech: compiled, proved, called in the process and over HTTP as OpenAI's clients do."""

from __future__ import annotations

import io
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.integration.test_serving_survives import Supervised
from tests.support import encoder_decoders
from tests.support.installed import install

import kedge
from kedge.importing.decoders import reading
from kedge_agent import Model, counters
from kedge_agent.generation.openai import OpenAiHandler
from kedge_agent.served_endpoint import Endpoint, knock
from kedge_agent.serving.handler import Job, Request, Response
from kedge_protocol.errors import ConfigError, DatasetError, InputError, TargetError
from kedge_targets.pipeline import speech
from kedge_targets.proof import ProveRequest, prove

RATE = 16000
FLOAT = "precision=float32"


def tone(seconds: float, hertz: float = 440.0) -> np.ndarray[Any, Any]:
    at = np.arange(int(seconds * RATE)) / RATE
    return np.asarray(0.3 * np.sin(2 * np.pi * hertz * at) * (1 + np.sin(9 * at)), np.float32)


def wav(samples: np.ndarray[Any, Any]) -> bytes:
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((np.clip(samples, -1, 1) * 32767).astype("<i2").tobytes())
    return content.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder-decoders")
    for name in ("t5", "marian", "whisper"):
        encoder_decoders.folder(path / name, name)
    lines = [f"Sentence {at} is {'short' if at % 2 else 'rather long'}." for at in range(12)]
    (path / "texts.txt").write_text("\n".join(lines))
    (path / "pairs.jsonl").write_text('{"source": "a cat", "target": "eine Katze"}\n{"source": "a dog"}\n')
    (path / "sounds").mkdir()
    for at in range(3):
        (path / "sounds" / f"{at}.wav").write_bytes(wav(tone(0.8 + at / 2, 200.0 * (at + 1))))
    (path / "sounds" / "0.txt").write_text("hello")
    return path


def compiled(place: Path, model: str, out: str, **options: Any) -> kedge.Release:
    data = place / options.pop("data", "sounds" if model == "whisper" else "texts.txt")
    return kedge.compile(
        place / model,
        name=model,
        version="1.0",
        targets=["generic-cpu"],
        calibration=data,
        evaluation=data,
        out=place / out,
        **{"quantize": FLOAT, **options},
    )


@pytest.fixture(scope="module")
def releases(place: Path) -> dict[str, kedge.Release]:
    return {name: compiled(place, name, f"out-{name}", slots=2) for name in ("t5", "marian", "whisper")}


@pytest.fixture(scope="module")
def models(releases: dict[str, kedge.Release]) -> Iterator[dict[str, Model]]:
    found = {name: Model(release.path, target="generic-cpu") for name, release in releases.items()}
    yield found
    for model in found.values():
        model.close()


def greedy(place: Path, name: str, source: Any, begin: list[int], count: int) -> list[int]:
    """What a float64 model writes, without its suppressed tokens."""
    decoder = reading.read(place / name)
    plain = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, source)
    rules = decoder.text.rules
    written: list[int] = []
    while len(written) < count:
        logits = plain.logits([*begin, *written])[-1]
        logits[list(rules.suppressed)] = -np.inf
        written.append(int(logits.argmax()))
        if written[-1] in decoder.text.end_tokens:
            return written[:-1]
    return written


@pytest.mark.parametrize("name", ["t5", "marian"])
def test_a_translation_is_that_of_float64(name: str, place: Path, models: dict[str, Model]) -> None:
    model = models[name]
    generator = model.loaded().generator
    text = "A small boat."
    tokens = [*generator.tokenizer.encode(text, add_special_tokens=False).ids, 2]
    found = model.generate(text, max_tokens=20)
    assert list(found.tokens) == greedy(place, name, np.array(tokens), [0], 20)
    assert found.prompt_tokens == len(tokens) + 1


@pytest.mark.parametrize("name", ["t5", "marian", "whisper"])
def test_a_bundle_is_proved_by_its_golden_vectors_and_a_damaged_encoder_is_not(
    name: str, releases: dict[str, kedge.Release], tmp_path: Path
) -> None:
    release = releases[name]
    bundle = release.bundles["generic-cpu"]
    for title, layer in bundle.files.items():
        (tmp_path / title).write_bytes((release.path / "blobs" / "sha256" / layer.digest[7:]).read_bytes())
    (tmp_path / "config").write_bytes(bundle.config_raw)
    request = ProveRequest(folder=str(tmp_path), config=str(tmp_path / "config"))
    answer = prove(request, lambda what, done, total: None)
    assert answer.holds, answer.reason
    data = bytearray((tmp_path / "decoder.bin").read_bytes())
    # The encoder's first layer lies before everything of the decoder but the embedding.
    data[len(data) // 5 : len(data) // 3] = bytes(len(data) // 3 - len(data) // 5)
    (tmp_path / "decoder.bin").write_bytes(data)
    assert not prove(request, lambda what, done, total: None).holds


def test_the_same_text_again_is_not_read_anew_and_another_is(models: dict[str, Model]) -> None:
    model = models["t5"]
    options: dict[str, Any] = {"max_tokens": 6, "ignore_end": True}
    first = {text: model.generate(text, **options).tokens for text in ("one text", "another", "one text")}
    again = model.generate("one text", **options)
    assert again.tokens == first["one text"] != first["another"]


def test_answers_at_once_are_those_that_come_alone(models: dict[str, Model]) -> None:
    texts = ["the cat sat", "A dog", "77 is a number of many", "x", "the cat sat"]
    for name in ("t5", "marian"):
        options: dict[str, Any] = {"max_tokens": 9, "ignore_end": True}
        alone = [models[name].generate(one, **options).tokens for one in texts]
        streams = [models[name].generate(one, stream=True, **options) for one in texts]
        assert [stream.finish().tokens for stream in streams] == alone


def test_a_task_puts_its_prefix_before_the_text(models: dict[str, Model]) -> None:
    model = models["t5"]
    named = model.generate("A cat", task="translation_en_to_de", max_tokens=8)
    assert named.tokens == model.generate("translate: A cat", max_tokens=8).tokens
    with pytest.raises(InputError, match=r"task 'summary' is not known.*translation_en_to_de"):
        model.generate("A cat", task="summary")
    with pytest.raises(InputError, match="no token >>fra<<"):
        models["marian"].generate("A cat", language="fra")


def test_what_an_encoder_cannot_read_is_an_error(models: dict[str, Model]) -> None:
    with pytest.raises(InputError, match="has 71 tokens, the encoder takes 1 to 64"):
        models["t5"].generate("x" * 70)
    with pytest.raises(InputError, match="does not take this prompt"):
        models["t5"].generate([{"role": "user", "content": "hello"}])
    with pytest.raises(InputError, match=r"does not take this prompt.*Call the model with a sound"):
        models["whisper"].generate("hello")
    with pytest.raises(InputError, match="writes text"):
        models["t5"]("hello")


def test_a_wav_becomes_the_text_that_float64_hears(place: Path, models: dict[str, Model], tmp_path: Path) -> None:
    model = models["whisper"]
    (tmp_path / "x.wav").write_bytes(wav(tone(1.2)))
    found = model(tmp_path / "x.wav", language="de")
    source = model.config.generation.source if model.config.generation is not None else None
    assert source is not None
    assert source.speech is not None
    heard = speech.features(speech.load(tmp_path / "x.wav", source.speech), source)
    begin = [96, 98, 99, 101]
    assert list(found.segments[0].tokens) == greedy(place, "whisper", heard, begin, 44)
    assert (found.language, found.seconds, str(found)) == ("de", 1.2, found.text)
    assert model(tone(1.2), language="de").text == model((tone(1.2), RATE), language="de").text
    # The likeliest of the languages' tokens, which are no part of the text.
    decoder = reading.read(place / "whisper")
    first = encoder_decoders.PlainEncoderDecoder(decoder.spec, decoder.weights, heard).logits([96])[0]
    assert model(tmp_path / "x.wav").language == ("en", "de")[int(first[[97, 98]].argmax())]


def test_a_longer_sound_is_cut_where_it_is_quietest(models: dict[str, Model]) -> None:
    generation = models["whisper"].config.generation
    assert generation is not None
    assert generation.source is not None
    samples = np.concatenate([tone(1.6), np.zeros(RATE // 4, np.float32), tone(2.0)])
    window = speech.window_length(generation.source)
    assert window == 2 * RATE
    parts = speech.windows(samples, generation.source)
    assert [first for first, _ in parts[1:]] == [last for _, last in parts[:-1]]
    assert parts[0][0] == 0
    assert parts[-1][1] == len(samples)
    assert 1.6 <= parts[0][1] / RATE <= 1.85
    assert all(last - first <= window for first, last in parts)
    found = models["whisper"](samples, language="en")
    assert [round(one.start * RATE) for one in found.segments] == [first for first, _ in parts]


@pytest.mark.parametrize(
    ("given", "text"),
    [(b"RIFF no wav at all", "is no wav file"), (wav(tone(1.0))[:30], "is no wav file"), ("missing.wav", "cannot be")],
)
def test_what_is_no_sound_is_an_error(given: Any, text: str, models: dict[str, Model]) -> None:
    with pytest.raises(InputError, match=text):
        models["whisper"](given)


def test_unknown_languages_and_tasks_are_errors_that_name_the_known(models: dict[str, Model]) -> None:
    with pytest.raises(InputError, match=r"language 'xx' is not known.*de, en"):
        models["whisper"](tone(1.0), language="xx")
    with pytest.raises(InputError, match=r"task 'sing' is not known.*transcribe, translate"):
        models["whisper"](tone(1.0), task="sing")


@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_an_installed_one_is_asked_through_its_endpoint_and_that_counts_nowhere(
    name: str, releases: dict[str, kedge.Release], tmp_path: Path
) -> None:
    folder = install(tmp_path / "state", releases[name].path)
    slot = folder.current()
    assert slot is not None
    server = Supervised(tmp_path / "state")
    try:
        server.wait(lambda: server.supervisor.said(name) is not None)
        assert knock(folder, slot.digest, endpoint=Endpoint(address=f"0.0.0.0:{server.port}")) > 0
        assert knock(folder, slot.digest) > 0
    finally:
        server.stop()
    assert counters.collect(folder.counters).inferences == 0


def test_int8_is_chosen_by_the_budget_and_said_in_the_report(place: Path) -> None:
    release = compiled(place, "t5", "out-budget", quantize=None, max_kl=0.0002, data="pairs.jsonl", max_perplexity="3x")
    report = release.generation
    assert report is not None
    entry = report.targets[0]
    assert entry.attempt.scheme.precision in ("int8", "float16")
    assert not entry.attempt.broken
    assert all(one.broken for one in entry.attempts[: entry.chosen])
    config = release.bundles["generic-cpu"].config
    assert config.generation is not None
    assert config.generation.source is not None
    fixed = config.generation.source.positions * config.generation.source.position_bytes
    assert config.generation.cache_bytes == 64 * config.generation.position_bytes + fixed > fixed > 0


def test_what_is_not_for_encoder_decoders_is_an_error(place: Path) -> None:
    with pytest.raises(ConfigError, match="gptq"):
        compiled(place, "t5", "no", quantize="method=gptq")
    with pytest.raises(ConfigError, match="--cache"):
        compiled(place, "t5", "no", cache="int8")
    with pytest.raises(ConfigError, match="--step"):
        compiled(place, "t5", "no", step=("prune-width",))
    with pytest.raises(DatasetError, match="holds no sound"):
        compiled(place, "whisper", "no", data="texts.txt")
    with pytest.raises(TargetError, match="the caches of 900000"):
        compiled(place, "whisper", "no", slots=900_000)


class _Served:
    scanned = True

    def __init__(self, models: dict[str, Model]) -> None:
        self._entries = {name: type("Entry", (), {"model": model})() for name, model in models.items()}

    def names(self) -> list[str]:
        return list(self._entries)

    def get(self, name: str) -> Any:
        return self._entries.get(name)


def _posted(models: dict[str, Model], path: str, body: bytes, kind: str) -> Response:
    handler = OpenAiHandler(_Served(models))  # type: ignore[arg-type]
    assert handler.methods(path) == ("POST",)
    answer = handler.route(Request("POST", path, fields={"content-type": kind}, body=body))
    found = answer.run() if isinstance(answer, Job) else answer
    assert isinstance(found, Response)
    return found


def _form(**fields: Any) -> tuple[bytes, str]:
    parts = []
    for name, value in fields.items():
        extra = '; filename="x.wav"\r\nContent-Type: audio/wav' if isinstance(value, bytes) else ""
        raw = value if isinstance(value, bytes) else str(value).encode()
        parts.append(f'--MARK\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + raw + b"\r\n")
    return b"".join(parts) + b"--MARK--\r\n", 'multipart/form-data; boundary="MARK"'


@pytest.mark.parametrize(
    ("fields", "status", "text"),
    [
        ({"file": b"", "model": "whisper"}, 400, b"file: is missing"),
        ({"file": b"x", "model": "t5"}, 404, b"no model 't5'"),
        ({"file": b"no wav", "model": "whisper"}, 400, b"is no wav file"),
        ({"file": b"x", "model": "whisper", "response_format": "srt"}, 400, b"response_format"),
        ({"file": b"x", "model": "whisper", "stream": "true"}, 400, b"stream: is not served"),
        ({"file": b"x", "model": "whisper", "temperature": "hot"}, 400, b"temperature"),
        ({"file": wav(tone(0.5)), "model": "whisper", "language": "xx"}, 400, b"language"),
    ],
)
def test_wrong_requests_for_transcripts_are_refused(
    fields: dict[str, Any], status: int, text: bytes, models: dict[str, Model]
) -> None:
    answer = _posted(models, "/v1/audio/transcriptions", *_form(**fields))
    assert answer.status == status
    assert isinstance(answer.body, bytes)
    assert text in answer.body


def test_bodies_that_are_no_form_are_refused(models: dict[str, Model]) -> None:
    body, kind = _form(file=wav(tone(0.5)), model="whisper")
    for broken, said in ((b"", kind), (body[:-20], kind), (body, "application/json"), (body, "multipart/form-data")):
        assert _posted(models, "/v1/audio/transcriptions", broken, said).status == 400


def test_a_sound_that_holds_the_boundary_is_taken_whole(models: dict[str, Model]) -> None:
    from kedge_agent.generation import audio_route

    sound = b"RIFF--MARK\r\n\r\n--MAR\r\n"
    body, kind = _form(model="whisper", file=sound, language="en")
    request = Request("POST", audio_route.PATHS[1], fields={"content-type": kind}, body=body)
    asked = audio_route.parse(request)
    assert (asked.sound, asked.task, asked.language) == (sound, "translate", "en")
