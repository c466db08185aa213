"""What other packages themselves export or save: boosted trees as ONNX, encoders as Hugging Face folders."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from tests.support import foreign

import kedge
from kedge_agent import Model

pytestmark = pytest.mark.zoo

TARGET = "generic-cpu"


def compiled(model: Path, folder: Path, arrays: dict[str, Any], label: Any, **options: Any) -> kedge.Release:
    """The model's release: a third of the samples calibrates, the others evaluate."""
    count = len(label) // 3
    np.savez(folder / "calibration.npz", **{name: array[:count] for name, array in arrays.items()})
    np.savez(folder / "evaluation.npz", label=label[count:], **{name: array[count:] for name, array in arrays.items()})
    return kedge.compile(
        model,
        name="export",
        version="1",
        targets=[TARGET],
        calibration=folder / "calibration.npz",
        evaluation=folder / "evaluation.npz",
        out=folder / "OUT",
        effort="quick",
        **options,
    )


def test_lightgbm_as_its_own_converter_writes_it(tmp_path: Path) -> None:
    foreign.importable("lightgbm", "onnxmltools", "onnxconverter-common")
    lightgbm, onnxmltools = (importlib.import_module(name) for name in ("lightgbm", "onnxmltools"))
    kinds = importlib.import_module("onnxmltools.convert.common.data_types")
    source = np.random.default_rng(0)
    x = source.normal(size=(600, 8)).astype(np.float32)
    names = np.array(["ant", "bee", "cat"])
    y = names[(x[:, 0] + x[:, 1] > 0).astype(int) + (x[:, 2] > 0.5)]
    fitted = lightgbm.LGBMClassifier(n_estimators=20, num_leaves=8, n_jobs=1, verbose=-1).fit(x, y)
    made = onnxmltools.convert_lightgbm(
        fitted, initial_types=[("input", kinds.FloatTensorType([None, 8]))], target_opset=15
    )
    onnx.save(made, tmp_path / "trees.onnx")
    fresh = source.normal(size=(300, 8)).astype(np.float32)
    label = np.searchsorted(names, fitted.predict(fresh))
    release = compiled(tmp_path / "trees.onnx", tmp_path, {"input": fresh}, label)
    assert release.report is not None
    assert (release.report.bundles[0].value, release.report.bundles[0].agreement) == (1.0, 1.0)
    assert release.bundles[TARGET].config.labels == ("ant", "bee", "cat")
    answer = np.asarray(Model(release.path, target=TARGET)(fresh))
    np.testing.assert_array_equal(answer.argmax(axis=1), label)


@pytest.mark.parametrize("family", ["DistilBert", "Roberta"])
def test_a_folder_of_an_encoder_by_torch_export(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packages = ("transformers", "huggingface-hub", "regex")
    foreign.importable(*packages)
    # The worker reads the folder, in a process of its own.
    path = [os.environ.get("PYTHONPATH", ""), *(str(foreign.package(name)) for name in packages)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(part for part in path if part))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 32},
        "Roberta": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
                    "max_position_embeddings": 34},
    }  # fmt: skip
    config = getattr(transformers, f"{family}Config")(vocab_size=200, num_labels=3, **sizes[family])
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "model")
    ids = np.random.default_rng(0).integers(4, 200, (96, 16))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    with torch.no_grad():
        label = model(**{name: torch.tensor(array) for name, array in arrays.items()}).logits.argmax(1).numpy()
    release = compiled(
        tmp_path / "model", tmp_path, arrays, label, quantize="precision=float32", max_drop=0.0, min_agreement=1.0
    )
    assert release.report is not None
    assert release.report.bundles[0].value == 1.0
    answer = Model(release.path, target=TARGET)(arrays)
    scores = answer["logits"] if isinstance(answer, dict) else np.asarray(answer)
    np.testing.assert_array_equal(np.asarray(scores).argmax(axis=1), label)
