"""Labels as the field stores them: what is the same in another dtype or shape has the same figure, or is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from sklearn.metrics import accuracy_score, f1_score, jaccard_score, roc_auc_score

from kedge.evaluation import kinds, metric
from kedge.evaluation.kinds import GraphEvidence
from kedge.evaluation.metrics.detection import FIELDS, matched
from kedge_protocol.errors import DatasetError
from kedge_targets.pipeline.boxes import Detections

Array = npt.NDArray[Any]

RNG = np.random.default_rng(3)
SCORES = RNG.normal(size=(90, 6)).astype(np.float32)
CLASSES = np.where(RNG.random(90) < 0.6, SCORES.argmax(axis=1), RNG.integers(0, 6, 90))
SIGMOID = GraphEvidence(sigmoid=True)


def judged(text: str | None, output: Array, labels: Any, behind: GraphEvidence | None = None) -> tuple[str, float]:
    """The metric's kind, and the float model's value."""
    outputs = {"y": output}
    seen = kinds.classify_outputs(
        outputs,
        graph={"y": behind or GraphEvidence()},
        inputs={},
        labels=labels,
        named=metric.named_output(text),
    )
    choice = metric.choose(text, kinds=seen, reference=outputs, labels=labels)
    return choice.kind, metric.score(choice, outputs, outputs, {}, labels).value


@pytest.mark.parametrize("text", [None, "top1", "top1:y", "f1", "top5", "auc"])
@pytest.mark.parametrize(
    "labels",
    [CLASSES.astype(np.uint8), CLASSES[:, None], CLASSES.astype(np.float32), CLASSES[:, None].astype(np.float64),
     np.eye(6)[CLASSES], np.eye(6, dtype=bool)[CLASSES]],
    ids=["uint8", "column", "real", "real column", "one-hot", "one-hot flags"],
)  # fmt: skip
def test_class_numbers_count_alike_in_every_form(text: str | None, labels: Array) -> None:
    assert judged(text, SCORES, labels) == judged(text, SCORES, CLASSES)
    if text == "top1":
        assert judged(text, SCORES, labels)[1] == pytest.approx(accuracy_score(CLASSES, SCORES.argmax(axis=1)))


@pytest.mark.parametrize("form", [np.int64, np.float32, np.bool_])
@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("named", [False, True])
def test_a_head_of_one_number_decides_at_a_half_or_at_zero(form: Any, column: bool, named: bool) -> None:
    logits = SCORES[:, :1]
    wanted = logits[:, 0] + RNG.normal(size=90) > 0
    labels = wanted.astype(form)[:, None] if column else wanted.astype(form)
    answers = logits[:, 0] > 0
    for output, behind in ((logits, None), (1 / (1 + np.exp(-logits)), SIGMOID)):
        end = ":y" if named else ""
        assert judged(f"top1{end}", output, labels, behind)[1] == pytest.approx(accuracy_score(wanted, answers))
        assert judged(f"f1{end}", output, labels, behind)[1] == pytest.approx(
            f1_score(wanted, answers, average="macro")
        )
        assert judged(f"auc{end}", output, labels, behind)[1] == pytest.approx(roc_auc_score(wanted, logits[:, 0]))
        assert judged(None, output, labels, behind)[0] == "top1"


def test_whole_numbers_may_be_what_a_regression_gives() -> None:
    ages = np.round(40 + 10 * SCORES[:, 0]).astype(np.int64)
    assert judged(None, 40 + 10 * SCORES[:, :1], ages)[0] == "r2"


@pytest.mark.parametrize("text", ["r2:y", "mae:y", "mse:y"])
@pytest.mark.parametrize("labels", [CLASSES, np.asarray(["a"] * 90), SCORES.T.copy()])
def test_labels_that_are_no_numbers_of_the_output_are_refused(text: str, labels: Array) -> None:
    with pytest.raises(DatasetError, match="numbers of shape 90x6 were expected"):
        judged(text, SCORES, labels)


@pytest.mark.parametrize("text", ["r2", "spearman"])
@pytest.mark.parametrize("count", [1, 90])
def test_a_share_of_variation_is_refused_where_nothing_varies(text: str, count: int) -> None:
    with pytest.raises(DatasetError, match=f"all labels are alike, so {text} says nothing.*--metric mae"):
        judged(text, SCORES[:count, :1], np.full(count, 2.5))


def test_tokens_of_padding_do_not_count() -> None:
    scores = RNG.normal(size=(20, 7, 5))
    labels = scores.argmax(axis=2)
    labels[::2, 1] = (labels[::2, 1] + 1) % 5
    padded, used = labels.copy(), np.ones_like(labels, dtype=bool)
    padded[:, 4:], used[:, 4:] = -100, False
    padded[3], used[3] = -100, False
    kind, value = judged(None, scores, padded)
    right = [labels[i, use] == scores[i, use].argmax(axis=1) for i, use in enumerate(used)]
    share = [one.mean() if one.size else 1.0 for one in right]
    assert (kind, value) == ("top1", pytest.approx(np.mean(share)))
    assert judged("f1", scores, padded)[1] == pytest.approx(
        f1_score(labels[used], scores[used].argmax(axis=1), average="macro")
    )
    with pytest.raises(DatasetError, match="label holds -1, the model's 5 classes are 0 to 4"):
        judged(None, scores, np.where(used, labels, -1))


MASKS = RNG.integers(0, 3, (6, 8, 9))
PIXELS = np.eye(3)[MASKS].transpose(0, 3, 1, 2) + RNG.normal(0, 0.7, (6, 3, 8, 9))


def test_masks_count_alike_in_every_form() -> None:
    wanted = jaccard_score(MASKS.ravel(), PIXELS.argmax(axis=1).ravel(), average="macro")
    for masks in (MASKS, MASKS.astype(np.uint8), MASKS.astype(np.float32), MASKS[:, None], MASKS[..., None]):
        assert judged("miou", PIXELS, masks)[1] == pytest.approx(wanted)
    assert judged("miou", PIXELS.argmax(axis=1), MASKS)[1] == pytest.approx(wanted)
    yes, score = MASKS > 0, PIXELS[:, 1:].sum(axis=1) - 0.5
    binary = jaccard_score(yes.ravel(), score.ravel() > 0, average="macro", labels=[0, 1])
    for output in (score, score[:, None], score[..., None]):
        for masks in (yes, yes.astype(np.uint8)):
            assert judged("miou", output, masks)[1] == pytest.approx(binary)


def test_masks_of_black_and_white_are_refused_since_white_does_not_count() -> None:
    """An IoU over black pixels alone would forgive every missed object."""
    with pytest.raises(DatasetError, match=r"holds 0 and 255 alone, and 255 does not count.*1 for yes"):
        judged("miou", PIXELS[:, :1], ((MASKS > 0) * 255).astype(np.uint8))
    with pytest.raises(DatasetError, match="label holds -1, the classes are 0 to 2"):
        judged("miou", PIXELS, MASKS - 1)


def test_boxes_of_classes_that_no_label_has_leave_the_rows_as_wide() -> None:
    """Rows of two candidates are joined where folds choose differently."""
    labels = np.full((1, 1, FIELDS), [1, 0.1, 0.1, 0.5, 0.5, 0], dtype=np.float32)
    box = labels[0, :, 1:5]
    rows = [
        matched([Detections(boxes=box, scores=np.ones(1), classes=np.asarray([kind]))], labels, (0.5,))
        for kind in (0, 1, 7)
    ]
    assert len({one.shape for one in rows}) == 1
