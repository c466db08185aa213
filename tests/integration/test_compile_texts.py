"""Models that take texts themselves (scikit-learn's vectorizers and encoders), from a CSV to an answer over HTTP."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from tests.support.compiling import unpacked
from tests.support.standalone import Served, serving

import kedge
from kedge_agent import Model
from kedge_protocol import frames
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.errors import InputError, LoweringError
from kedge_protocol.golden import load
from kedge_targets.proof import ProveRequest, prove

pytest.importorskip("skl2onnx")
pytest.importorskip("sklearn")

TARGET = "generic-cpu"
GOOD, BAD = ["gut", "schön", "toll", "prima", "Freude"], ["schlecht", "übel", "mies", "Ärger", "kaputt"]
PLAIN = ["das", "Gerät", "heute", "im", "Straßenverkehr", "sehr"]


def sentences(count: int, seed: int) -> tuple[list[str], list[str]]:
    """Words in any order, of which two tell the class; and the classes' names."""
    rng = np.random.default_rng(seed)
    texts, names = [], []
    for _ in range(count):
        good = bool(rng.integers(2))
        words = [*rng.choice(PLAIN, 4), *rng.choice(GOOD if good else BAD, 2)]
        texts.append(" ".join(map(str, rng.permutation(words))))
        names.append("good" if good else "bad")
    return texts, names


def written(path: Path, header: list[str], *columns: Any) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *zip(*columns, strict=True)])
    return path


def compiled(model: Any, folder: Path, **options: Any) -> kedge.Release:
    asked = {
        "targets": [TARGET],
        "effort": "quick",
        "calibration": folder / "train.csv",
        "evaluation": folder / "val.csv",
    }
    return kedge.compile(model, name="texts", version="1", out=folder / "OUT", **asked | options)


@pytest.fixture(scope="module")
def fitted() -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(*sentences(200, 0))


@pytest.fixture(scope="module")
def release(fitted: Any, tmp_path_factory: pytest.TempPathFactory) -> kedge.Release:
    folder = tmp_path_factory.mktemp("texts")
    joblib.dump(fitted, folder / "model.joblib")
    written(folder / "train.csv", ["text", "label"], *sentences(32, 1))
    written(folder / "val.csv", ["text", "label"], *sentences(80, 2))
    return compiled(folder / "model.joblib", folder, trust_pickle=True)


@pytest.fixture(scope="module")
def served(release: kedge.Release) -> Iterator[Served]:
    with serving(str(release.path)) as one:
        one.wait()
        yield one


def test_a_vectorizer_answers_as_it_does_words_with_accents_too(release: kedge.Release, fitted: Any) -> None:
    assert release.report is not None
    assert release.report.bundles[0].agreement == 1.0
    assert release.bundles[TARGET].config.labels == ("bad", "good")
    fresh, _ = sentences(60, 3)
    model = Model(release.path, target=TARGET)
    np.testing.assert_allclose(model(fresh), fitted.predict_proba(fresh), atol=1e-5)
    np.testing.assert_allclose(model(fresh[0]), fitted.predict_proba(fresh[:1])[0], atol=1e-5)
    raw = np.array([text.encode() for text in fresh], dtype=object)
    np.testing.assert_allclose(model.raw(raw), fitted.predict_proba(fresh), atol=1e-5)


def test_golden_vectors_hold_texts_and_tell_another_model(release: kedge.Release, tmp_path: Path) -> None:
    bundle = release.bundles[TARGET]
    vectors = load(Layout(release.path).blob_path(bundle.config.golden.digest))
    assert vectors.inputs["input"].dtype.kind == "U"
    folder = unpacked(release, TARGET, tmp_path / "bundle")
    config = tmp_path / "config.json"
    config.write_bytes(Layout(release.path).bundle(TARGET).config_raw)
    answer = prove(ProveRequest(folder=str(folder), config=str(config)), lambda what, done, total: None)
    assert answer.holds
    raw = (folder / "model.onnx").read_bytes()
    word = next(text for text in vectors.inputs["input"][0].split() if text in GOOD + BAD).lower().encode()
    assert raw.count(word) == 1
    (folder / "model.onnx").write_bytes(raw.replace(word, word[::-1]))
    answer = prove(ProveRequest(folder=str(folder), config=str(config)), lambda what, done, total: None)
    assert not answer.holds


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (3.0, "is no text"),
        (np.array([b"\xff"], dtype=object), "not UTF-8"),
        (np.array([1, None], dtype=object), "no text"),
    ],
)
def test_what_is_no_text_is_refused(release: kedge.Release, given: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        Model(release.path, target=TARGET)(given)


def test_texts_over_http_are_bytes(served: Served, fitted: Any) -> None:
    status, told = served.ask("GET", "/v2/models/texts")
    assert (status, told["inputs"]) == (200, [{"name": "input", "datatype": "BYTES", "shape": [-1]}])
    fresh, _ = sentences(3, 4)
    given = {"name": "input", "datatype": "BYTES", "shape": [3], "data": fresh}
    status, answer = served.ask("POST", "/v2/models/texts/infer", {"inputs": [given]})
    got = np.reshape(answer["outputs"][0]["data"], (3, 2))
    np.testing.assert_allclose(got, fitted.predict_proba(fresh), atol=1e-5)
    assert "parameters" not in answer
    numbers = {**given, "datatype": "FP32", "data": [1, 2, 3]}
    status, answer = served.ask("POST", "/v2/models/texts/infer", {"inputs": [numbers]})
    assert (status, answer["error"]) == (400, "input 'input': the model takes text (BYTES), not numbers")


def graph_of(release: kedge.Release, folder: Path) -> Path:
    """The file of the bundle, as a model."""
    graph = folder / "model.onnx"
    stored = release.bundles[TARGET].files["model.onnx"]
    graph.write_bytes(Layout(release.path).blob_path(stored.digest).read_bytes())
    return graph


def test_a_target_without_texts_says_so(release: kedge.Release, tmp_path: Path) -> None:
    written(tmp_path / "train.csv", ["text"], sentences(16, 1)[0])
    (tmp_path / "val.csv").symlink_to(tmp_path / "train.csv")
    with pytest.raises(LoweringError, match="'input' takes texts, and the runtime of tflite") as caught:
        compiled(graph_of(release, tmp_path), tmp_path, targets=["rpi4"])
    assert "generic-cpu" in (caught.value.remedy or "")


def table(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """``[N, 3]`` of objects: a town, an age, an income; and yes or no."""
    rng = np.random.default_rng(seed)
    rows = np.empty((count, 3), dtype=object)
    rows[:, 0] = rng.choice(["Berlin", "Köln", "Paris"], count)
    rows[:, 1], rows[:, 2] = rng.integers(18, 90, count), rng.normal(3000, 800, count).round(2)
    return rows, np.where((rows[:, 0] == "Berlin") | (rows[:, 1] > 60), "yes", "no")


def test_columns_of_texts_and_numbers_by_name(tmp_path: Path) -> None:
    from sklearn.compose import ColumnTransformer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler
    from sklearn.tree import DecisionTreeClassifier

    parts = [("town", OneHotEncoder(handle_unknown="ignore"), [0]), ("numbers", StandardScaler(), [1, 2])]
    tree = make_pipeline(ColumnTransformer(parts), DecisionTreeClassifier(random_state=0)).fit(*table(300, 0))
    for name, seed in (("train", 1), ("val", 2)):
        rows, label = table(60, seed)
        written(tmp_path / f"{name}.csv", ["town", "age", "income", "label"], *rows.T, label)
    release = compiled(tree, tmp_path)
    config = release.bundles[TARGET].config
    assert [(spec.name, spec.dtype, spec.shape) for spec in config.inputs] == [
        ("town", "str", (None, 1)), ("age", "float32", (None, 1)), ("income", "float32", (None, 1))
    ]  # fmt: skip
    fresh, _ = table(40, 3)
    model = Model(release.path, target=TARGET)
    columns = {spec.name: [[one] for one in fresh[:, at]] for at, spec in enumerate(config.inputs)}
    got = model(columns)
    scores = got["probabilities"] if isinstance(got, dict) else got
    np.testing.assert_array_equal(np.array(["no", "yes"])[np.argmax(scores, axis=1)], tree.predict(fresh))


@pytest.mark.parametrize("kind", ["npz", "iterable"])
def test_texts_from_arrays_and_iterables(release: kedge.Release, tmp_path: Path, kind: str) -> None:
    train, (texts, names) = sentences(16, 5)[0], sentences(24, 6)
    numbers = [("bad", "good").index(name) for name in names]
    if kind == "npz":
        np.savez(tmp_path / "c.npz", input=np.array(train))
        np.savez(tmp_path / "e.npz", input=np.array(texts), label=np.array(names))
        data: dict[str, Any] = {"calibration": tmp_path / "c.npz", "evaluation": tmp_path / "e.npz"}
    else:
        data = {"calibration": iter(sorted(train, key=len)), "evaluation": list(zip(texts, numbers, strict=True))}
    made = compiled(graph_of(release, tmp_path), tmp_path, quantize="precision=float32", **data)
    assert made.report is not None
    assert made.report.bundles[0].value == 1.0


def test_frames_carry_texts() -> None:
    call = frames.Call(
        digest="sha256:0", nanoseconds=1, inputs={"x": np.array(["ä", "bc"])}, outputs={"y": np.array([1.0])}
    )
    raw = frames.encode(call)
    assert raw is not None
    ((head, body),) = frames.split(raw)
    assert frames.decode(head, body).inputs["x"].tolist() == ["ä", "bc"]
