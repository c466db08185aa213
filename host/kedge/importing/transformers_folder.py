"""Reads folders of Hugging Face's transformers (encoders of text, pictures and sound), if that package is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedge_protocol.errors import MissingDependencyError, ModelError

if TYPE_CHECKING:
    from kedge.importing.pytorch import Example

_LENGTH = 16
_SECONDS = 1


def check(path: Path) -> None:
    """Check a folder before anything is loaded.

    Raises:
        ModelError: ``config.json`` is invalid, weights are missing, or the model is generative.
        MissingDependencyError: transformers is not installed.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        architectures = list(config.get("architectures") or [])
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"its config.json cannot be read: {error}", where=str(path)) from error
    if not architectures:
        raise ModelError(
            "is a folder whose config.json names no architecture, and none that can be read",
            where=str(path),
            remedy="Give the folder that model.save_pretrained wrote",
        )
    if architectures[0].endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")):
        raise ModelError(
            f"{architectures[0]} generates: what it says next depends on what it said",
            where=str(path),
            remedy="From such a folder an encoder is compiled (classes, embeddings, pictures): see docs/models.md",
        )
    if not list(path.glob("*.safetensors")):
        raise ModelError(
            "holds no .safetensors",
            where=str(path),
            remedy="Save it anew: model.save_pretrained(folder, safe_serialization=True)",
        )
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            "a Hugging Face folder is read by transformers, which is not installed",
            remedy="Install it beside Kedge: pip install transformers; or export the model to ONNX and give that file",
        )


def read(path: Path) -> tuple[Any, Example]:
    """Return the model as a module that takes tensors, and example inputs.

    Raises:
        ModelError: as in :func:`check`, or transformers cannot load the model.
    """
    check(path)
    import torch
    import transformers

    name = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    try:
        model = getattr(transformers, name).from_pretrained(
            str(path), local_files_only=True, use_safetensors=True, attn_implementation="eager", dtype=torch.float32
        )
    except Exception as error:
        raise ModelError(
            f"transformers cannot load it: {' '.join(str(error).split())[:300]}",
            where=str(path),
            remedy=f"It must hold a {name} of transformers {transformers.__version__}",
        ) from error
    return _plain(model), _example(model, str(path))


def _plain(model: Any) -> Any:
    import torch

    class Plain(torch.nn.Module):  # type: ignore[misc]
        """A module that takes tensors and returns tensors."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def answered(self, **inputs: Any) -> Any:
            answer = self.model(**inputs, return_dict=True)
            wanted = ("logits", "last_hidden_state", "pooler_output", "text_embeds", "image_embeds")
            found = {key: answer[key] for key in wanted if key in answer and answer[key] is not None}
            return {"logits": found["logits"]} if "logits" in found else found

    class Text(Plain):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.answered(input_ids=input_ids, attention_mask=attention_mask)

    class Pictures(Plain):
        def forward(self, pixel_values: Any) -> Any:
            return self.answered(pixel_values=pixel_values)

    class Sound(Plain):
        def forward(self, input_values: Any) -> Any:
            return self.answered(input_values=input_values)

    return {"pixel_values": Pictures, "input_values": Sound}.get(model.main_input_name, Text)()


def _example(model: Any, where: str) -> Example:
    import torch

    from kedge.importing.pytorch import Example

    config, name = model.config, model.main_input_name
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or 224
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        return Example((torch.randn(2, int(getattr(config, "num_channels", 3)), height, width),))
    if name == "input_values":
        rate = int(getattr(config, "sampling_rate", 16000))
        return Example((torch.randn(2, _SECONDS * rate),), {}, {"input_values": {1: "length"}})
    if name != "input_ids":
        raise ModelError(
            f"it takes {name!r}, which is not known here", where=where, remedy="Export it to ONNX yourself"
        )
    tokens = torch.randint(1, int(config.vocab_size), (2, _LENGTH))
    free = {"input_ids": {1: "sequence"}, "attention_mask": {1: "sequence"}}
    longest = getattr(config, "max_position_embeddings", None)
    return Example(
        (tokens, torch.ones_like(tokens)), {}, free, {} if longest is None else {"sequence": _usable(config, longest)}
    )


def _usable(config: Any, positions: int) -> int:
    """Return the number of tokens that have a position: RoBERTa and similar models start counting after the padding
    index."""
    offset = int(getattr(config, "pad_token_id", None) or 0) + 1
    return positions - offset if "roberta" in str(config.model_type) else positions


def tools() -> dict[str, str]:
    """Return the versions of the packages that read the model."""
    return {"transformers": importlib.metadata.version("transformers")}
