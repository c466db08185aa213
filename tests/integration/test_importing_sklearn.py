"""Fitted estimators of scikit-learn, as files and as objects, and what others export in the same form."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import kedge
from kedge.importing import model_kinds, pickled
from kedge.importing.worker_messages import ImportRequest
from kedge.importing.worker_tasks import import_model
from kedge_agent import Model
from kedge_protocol.errors import ModelError
from kedge_targets.graph import classifier_outputs, model_reader
from kedge_targets.importer import Importer

pytest.importorskip("skl2onnx")
sklearn = pytest.importorskip("sklearn")

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(120, 6)).astype(np.float32)
CLASSES = (FEATURES[:, 0] + FEATURES[:, 1] > 0).astype(np.int64) + (FEATURES[:, 2] > 1)


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody hears."""


def pipelines() -> dict[str, Any]:
    from sklearn.cluster import KMeans
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
    from sklearn.ensemble import (
        GradientBoostingClassifier,
        HistGradientBoostingClassifier,
        RandomForestClassifier,
        RandomForestRegressor,
        VotingClassifier,
        VotingRegressor,
    )
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.multiclass import OneVsOneClassifier
    from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor
    from sklearn.neural_network import MLPRegressor
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import KBinsDiscretizer, StandardScaler
    from sklearn.svm import SVC
    from sklearn.tree import DecisionTreeClassifier

    votes = [("line", LogisticRegression()), ("tree", DecisionTreeClassifier(max_depth=3))]
    names = np.array(["no", "maybe", "yes"])
    network = MLPRegressor(hidden_layer_sizes=(4,), tol=1.0, random_state=0)
    several = np.stack([CLASSES, CLASSES % 2], axis=1)
    return {
        "forest": RandomForestClassifier(8, max_depth=4, random_state=0).fit(FEATURES, CLASSES),
        "boosting": GradientBoostingClassifier(n_estimators=5, random_state=0).fit(FEATURES, CLASSES),
        "machine": make_pipeline(StandardScaler(), SVC(random_state=0)).fit(FEATURES, CLASSES),
        "texts": LogisticRegression().fit(FEATURES, names[CLASSES]),
        "two sides": SVC(random_state=0).fit(FEATURES, CLASSES > 0),
        "clusters": KMeans(3, n_init=1, random_state=0).fit(FEATURES),
        "histograms": HistGradientBoostingClassifier(max_iter=4).fit(FEATURES, CLASSES),
        "votes": VotingClassifier(votes, voting="soft").fit(FEATURES, CLASSES),
        "votes of labels": VotingClassifier(votes).fit(FEATURES, CLASSES),
        "votes of numbers": VotingRegressor([("a", Ridge()), ("b", Ridge(9.0))]).fit(FEATURES, FEATURES[:, 0]),
        "several labels": MultiOutputClassifier(LogisticRegression()).fit(FEATURES, several),
        "several labels of trees": RandomForestClassifier(4, random_state=0).fit(FEATURES, several),
        "several numbers": MultiOutputRegressor(Ridge()).fit(FEATURES, FEATURES[:, :3] ** 2),
        "several numbers of a network": network.fit(FEATURES, FEATURES[:, :3] ** 2),
        "pairs of classes": make_pipeline(StandardScaler(), OneVsOneClassifier(LogisticRegression())).fit(
            FEATURES, CLASSES
        ),
        "quadratic": make_pipeline(StandardScaler(), QuadraticDiscriminantAnalysis()).fit(FEATURES, CLASSES),
        "bins": make_pipeline(KBinsDiscretizer(4), LogisticRegression()).fit(FEATURES, CLASSES),
        "number": RandomForestRegressor(4, max_depth=4, random_state=0).fit(FEATURES, FEATURES[:, 0]),
    }


@pytest.mark.parametrize("name", sorted(pipelines()))
def test_an_estimator_becomes_a_graph_that_answers_the_same(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.joblib"
    joblib.dump(pipelines()[name], path)
    np.save(tmp_path / "x.npy", FEATURES[:20])
    request = ImportRequest(
        source=str(path), workdir=str(tmp_path / "work"), inputs={"input": str(tmp_path / "x.npy")}, trust_pickle=True
    )
    made = import_model(request, silent)
    graph = model_reader.read(Path(made.graph))
    assert [value.name for value in graph.graph.input] == ["input"]
    assert "skl2onnx" in made.tools
    if name == "texts":
        assert classifier_outputs.class_names(graph) == ("maybe", "no", "yes")


def test_a_fitted_object_compiles_and_answers_as_it_does(tmp_path: Path) -> None:
    forest = pipelines()["forest"]
    np.savez(tmp_path / "c.npz", input=FEATURES[:40])
    np.savez(tmp_path / "e.npz", input=FEATURES[40:100], label=CLASSES[40:100])
    release = kedge.compile(
        forest,
        name="forest",
        version="1",
        targets=["generic-cpu"],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
    )
    answer = Model(release.path, target="generic-cpu")(FEATURES[100:])
    assert np.array_equal(answer["label"], forest.predict(FEATURES[100:]))
    assert np.allclose(answer["probabilities"], forest.predict_proba(FEATURES[100:]), atol=1e-5)


def test_missing_values_of_a_table_reach_the_imputer(tmp_path: Path) -> None:
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    gaps = FEATURES.copy()
    gaps[RNG.random(gaps.shape) < 0.1] = np.nan
    fitted = make_pipeline(SimpleImputer(), LogisticRegression()).fit(gaps, CLASSES)
    for name, rows in (("c.csv", range(40)), ("e.csv", range(40, 100))):
        lines = [
            ",".join("" if np.isnan(one) else f"{one:.9g}" for one in gaps[row]) + f",{CLASSES[row]}" for row in rows
        ]
        (tmp_path / name).write_text("\n".join(["a,b,c,d,e,f,label", *lines]) + "\n", encoding="utf-8")
    release = kedge.compile(
        fitted, name="gaps", version="1", targets=["generic-cpu"], calibration=tmp_path / "c.csv",
        evaluation=tmp_path / "e.csv", out=tmp_path / "OUT", quantize="precision=float32",
    )  # fmt: skip
    answer = Model(release.path, target="generic-cpu")(gaps[100:])
    assert np.array_equal(answer["label"], fitted.predict(gaps[100:]))


def test_labels_may_be_the_names_that_the_model_holds(tmp_path: Path) -> None:
    names = np.array(["no", "maybe", "yes"])[CLASSES]
    np.savez(tmp_path / "c.npz", input=FEATURES[:40])
    np.savez(tmp_path / "e.npz", input=FEATURES[40:100], label=names[40:100])
    release = kedge.compile(
        pipelines()["texts"],
        name="texts",
        version="1",
        targets=["generic-cpu"],
        calibration=tmp_path / "c.npz",
        evaluation=tmp_path / "e.npz",
        out=tmp_path / "OUT",
        effort="quick",
    )
    assert release.report is not None
    assert release.report.metric == "top1"
    assert release.bundles["generic-cpu"].config.labels == ("maybe", "no", "yes")


@pytest.mark.parametrize("suffix", [".pkl", ".joblib", ".pt", ".h5"])
def test_without_trust_a_pickle_is_not_read_and_the_reason_is_said(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ModelError, match=r"may .*code .*when it is read.*--trust-pickle"):
        model_kinds.recognise(str(path))
    assert not Trap.sprung
    assert isinstance(model_kinds.recognise(str(path), trust_pickle=True), model_kinds.Kind)
    assert not Trap.sprung


class Trap:
    """Says when it is unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _spring, ()


def _spring() -> Trap:
    Trap.sprung = True
    return Trap()


def test_a_yolo_checkpoint_is_known_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    path.write_bytes(b"\x80\x02cultralytics.nn.tasks\nDetectionModel\n.")
    assert pickled.is_ultralytics(path)
    with pytest.raises(ModelError, match=r"AGPL.*yolo export model=best.pt format=onnx.*--trust-pickle"):
        model_kinds.recognise(str(path))
    # Whoever trusts it has it read by Ultralytics' own code, in its toolchain.
    kind = model_kinds.recognise(str(path), trust_pickle=True)
    assert isinstance(kind, Importer)
    assert kind.kind(path) == "Ultralytics checkpoint"


def test_weights_alone_and_other_objects_are_refused(tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    with (tmp_path / "other.pkl").open("wb") as file:
        pickle.dump([1, 2], file)
    for name, said in (("w.pt", "weights without a network"), ("other.pkl", "a list, no model")):
        request = ImportRequest(source=str(tmp_path / name), workdir=str(tmp_path / "work"), trust_pickle=True)
        with pytest.raises(ModelError, match=said):
            import_model(request, silent)


def test_torchscript_is_told_what_to_do(tmp_path: Path) -> None:
    import torch

    torch.jit.save(torch.jit.script(torch.nn.Linear(6, 2)), str(tmp_path / "script.pt"))
    np.save(tmp_path / "x.npy", FEATURES)
    request = ImportRequest(
        source=str(tmp_path / "script.pt"), workdir=str(tmp_path / "work"), inputs={"input": str(tmp_path / "x.npy")},
        trust_pickle=True,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"is TorchScript.*torch\.onnx\.export"):
        import_model(request, silent)


def test_a_pickled_module_is_traced(tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.ReLU()), tmp_path / "net.pth")
    np.save(tmp_path / "x.npy", FEATURES[:2])
    request = ImportRequest(
        source=str(tmp_path / "net.pth"),
        workdir=str(tmp_path / "work"),
        inputs={"input": str(tmp_path / "x.npy")},
        trust_pickle=True,
    )
    assert "free axes: batch" in import_model(request, silent).notes


def test_a_zipmap_gives_its_scores_and_names(tmp_path: Path) -> None:
    """As skl2onnx, XGBoost and LightGBM write classifiers by default."""
    tree = helper.make_node(
        "TreeEnsembleClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", name="trees", class_ids=[0, 1, 0, 1],
        class_nodeids=[1, 1, 2, 2], class_treeids=[0] * 4, class_weights=[0.9, 0.1, 0.2, 0.8],
        classlabels_strings=["cat", "dog"], nodes_falsenodeids=[2, 0, 0], nodes_featureids=[1, 0, 0],
        nodes_hitrates=[1.0] * 3, nodes_missing_value_tracks_true=[0] * 3, nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_nodeids=[0, 1, 2], nodes_treeids=[0] * 3, nodes_truenodeids=[1, 0, 0], nodes_values=[0.1, 0.0, 0.0],
        post_transform="NONE",
    )  # fmt: skip
    zipped = helper.make_node(
        "ZipMap", ["scores"], ["probabilities"], domain="ai.onnx.ml", name="zip", classlabels_strings=["cat", "dog"]
    )
    maps = helper.make_value_info(
        "probabilities",
        helper.make_sequence_type_proto(
            helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
        ),
    )
    graph = helper.make_graph(
        [tree, zipped],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None, 4])],
        [helper.make_tensor_value_info("label", TensorProto.STRING, [None]), maps],
    )
    opsets = [helper.make_opsetid("ai.onnx.ml", 1), helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    read = model_reader.read(tmp_path / "m.onnx")
    assert [value.name for value in read.graph.output] == ["probabilities"]
    assert classifier_outputs.class_names(read) == ("cat", "dog")
