"""``--metric file.py:function``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kedge.evaluation import metric
from kedge.evaluation.metric import USER, Choice
from kedge.evaluation.user import check_reference, load
from kedge_protocol.errors import ConfigError

OUTPUTS = {"y": np.array([[1.0, 2.0]])}


def written(folder: Path, body: str) -> Choice:
    path = folder / "mine.py"
    path.write_text(body)
    return Choice(kind=USER, name="mine.py:f", function=f"{path}:f")


def score(choice: Choice, *arguments: Any) -> float:
    return metric.score(choice, *arguments).value


def test_it_gets_outputs_inputs_and_labels(tmp_path: Path) -> None:
    choice = written(
        tmp_path, "def f(outputs, inputs, labels):\n    return outputs['y'].sum() + inputs['x'][0] + labels[0]"
    )
    assert score(choice, OUTPUTS, OUTPUTS, {"x": np.array([10.0])}, np.array([100])) == 113.0


def test_labels_are_none_where_there_are_none(tmp_path: Path) -> None:
    choice = written(tmp_path, "def f(outputs, inputs, labels):\n    return 1 if labels is None else 0")
    assert score(choice, OUTPUTS, OUTPUTS, {}, None) == 1.0


def test_it_may_import_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("VALUE = 0.25")
    choice = written(tmp_path, "from beside_mine import VALUE\ndef f(o, i, l):\n    return VALUE")
    assert score(choice, OUTPUTS, OUTPUTS, {}, None) == 0.25


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def f(o, i, l):\n    return 1 / 0", r"mine\.py:f raised ZeroDivisionError: .*line 2 of mine\.py"),
        ("def f(o, i, l):\n    return 'high'", "gave 'high', a finite number"),
        ("def f(o, i, l):\n    return float('nan')", "gave nan"),
        ("def g(o, i, l):\n    return 1", "has no function 'f'"),
        ("import nothing_of_that_name", "cannot be imported: ModuleNotFoundError"),
        ("def f(:", "cannot be imported: SyntaxError"),
    ],
)
def test_its_failures_are_told(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        score(written(tmp_path, body), OUTPUTS, OUTPUTS, {}, None)


@pytest.mark.parametrize("text", ["mine.py", "mine:f", "mine.py:", "mine.py:a b"])
def test_the_form_is_checked(text: str) -> None:
    with pytest.raises(ConfigError, match=r"Write it as file\.py:function"):
        check_reference(text)


def test_a_missing_file_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        load(f"{tmp_path}/absent.py:f")


TEN = {"y": np.arange(10.0).reshape(10, 1)}


def test_one_number_for_each_sample_is_kept_by_sample(tmp_path: Path) -> None:
    made = metric.score(written(tmp_path, "def f(o, i, l):\n    return o['y'][:, 0]"), TEN, TEN, {}, None)
    assert made.value == 4.5
    assert made.rows is not None
    assert made.rows.array.tolist() == list(range(10))


def test_one_number_for_all_is_asked_for_again_on_drawn_samples(tmp_path: Path) -> None:
    made = metric.score(written(tmp_path, "def f(o, i, l):\n    return o['y'].mean()"), TEN, TEN, {}, None)
    assert made.rows is None
    assert len(made.again) > 100
    assert len(set(made.again)) > 10


def test_a_function_that_knows_its_samples_by_their_places_is_called_on_all_of_them_alone(tmp_path: Path) -> None:
    body = "import numpy as np\ndef f(o, i, l):\n    return -float(np.abs(o['y'][:, 0] - np.arange(10)).max())"
    assert metric.score(written(tmp_path, body), TEN, TEN, {}, None).again == ()
