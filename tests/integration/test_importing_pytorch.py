"""PyTorch modules, exported programs and objects, through the import, against PyTorch itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.importing import Importer, answers, close, importer, signature

from kedge_protocol.errors import ModelError, UnsupportedOperatorError
from kedge_targets.graph import model_reader, opsets

__all__ = ["importer"]

NETS = '''
import torch
from torch import nn


class Encoder(nn.Module):
    """A small transformer encoder with an attention mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, ids, attention_mask):
        hidden = self.layers(self.embed(ids), src_key_padding_mask=attention_mask == 0)
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weight).sum(1) / weight.sum(1))


class Picture(nn.Module):
    """Two outputs, a dropout and a batch norm, which show whether it was in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)

    def forward(self, input):
        hidden = self.drop(torch.relu(self.norm(self.conv(input)))).mean((2, 3))
        return {"score": self.head(hidden), "hidden": hidden}


class Eigen(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x).real


class Rigid(nn.Module):
    """Its forward asks for one sample."""

    def forward(self, x):
        if x.shape[0] != 1:
            raise ValueError("one sample, please")
        return x * 2


def seeded(kind):
    torch.manual_seed(0)
    return kind()


def encoder():
    example = {"ids": torch.randint(0, 50, (1, 9)), "attention_mask": torch.ones(1, 9, dtype=torch.int64)}
    free = {"ids": {1: "sequence"}, "attention_mask": {1: torch.export.Dim("sequence")}}
    return seeded(Encoder), example, free


def bare_encoder():
    return seeded(Encoder)


def picture():
    return seeded(Picture)


def with_weights():
    module = seeded(Encoder)
    module.load_state_dict(torch.load("weights.pt", weights_only=True))
    return module, (torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))


def eigen():
    return Eigen(), torch.rand(1, 4, 4)


def linear():
    return seeded(lambda: nn.Linear(4, 2)), torch.rand(1, 4)


def rigid():
    return Rigid(), torch.rand(1, 4)


def raises():
    raise FileNotFoundError("weights.pt")


def leaves():
    raise SystemExit(3)


def number():
    return 3


def wants_more():
    return seeded(Encoder), (torch.zeros(1, 4, dtype=torch.int64),)


def program():
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    module, example, _ = encoder()
    return torch.export.export(
        module.eval(),
        tuple(torch.cat([value, value]) for value in example.values()),
        dynamic_shapes=(dims, dims),
    )
'''


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("nets") / "nets.py"
    path.write_text(NETS)
    return path


@pytest.fixture(scope="module")
def modules(nets: Path) -> dict[str, Any]:
    """The same code in this process, where PyTorch itself answers."""
    made: dict[str, Any] = {}
    exec(compile(NETS, "nets.py", "exec"), made)
    return made


def sentences(count: int, length: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    mask = np.ones((count, length), np.int64)
    mask[0, length // 2 :] = 0
    return {"ids": rng.integers(0, 50, (count, length)), "attention_mask": mask}


def torch_answers(module: Any, *arrays: Any) -> Any:
    import torch

    with torch.no_grad():
        return module.eval()(*(torch.from_numpy(array) for array in arrays))


def test_a_transformer_with_a_mask_and_a_free_length(importer: Importer, nets: Path, modules: dict[str, Any]) -> None:
    made = importer(f"{nets}:encoder")
    assert made.kind == "PyTorch module"
    assert made.notes == ("free axes: batch, sequence",)
    assert signature(made.graph) == (
        {"ids": ["batch", "sequence"], "attention_mask": ["batch", "sequence"]},
        {"output": ["batch", 3]},
    )
    module = modules["encoder"]()[0]
    assert made.size_bytes == sum(4 * part.numel() for part in module.parameters())
    for count, length in ((1, 9), (4, 5), (2, 17)):
        feed = sentences(count, length)
        assert close(answers(made.graph, feed)[0], torch_answers(module, *feed.values()).numpy())


def test_the_graph_is_one_that_backends_read(importer: Importer, nets: Path) -> None:
    model = model_reader.read(Path(importer(f"{nets}:encoder").graph))
    assert opsets.version(model) == 20
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_example_inputs_from_samples_by_the_names_of_the_arguments(
    importer: Importer, nets: Path, modules: dict[str, Any]
) -> None:
    feed = sentences(3, 7)
    # In another order than forward's.
    made = importer(f"{nets}:bare_encoder", {name: feed[name] for name in ("attention_mask", "ids")})
    assert signature(made.graph)[0] == {"ids": ["batch", 7], "attention_mask": ["batch", 7]}
    wanted = torch_answers(modules["bare_encoder"](), *feed.values()).numpy()
    assert close(answers(made.graph, feed)[0], wanted)


def test_raw_pixels_several_outputs_and_evaluation_mode(
    importer: Importer, nets: Path, modules: dict[str, Any]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    made = importer(f"{nets}:picture", {"input": pixels})
    assert signature(made.graph) == (
        {"input": ["batch", 3, 8, 8]},
        {"score": ["batch", 5], "hidden": ["batch", 4]},
    )
    feed = {"input": pixels.astype(np.float32)}
    wanted = torch_answers(modules["picture"](), feed["input"])
    for mine, theirs in zip(answers(made.graph, feed), wanted.values(), strict=True):
        assert close(mine, theirs.numpy())


def test_the_batch_is_fixed_on_request_and_that_is_said(importer: Importer, nets: Path) -> None:
    made = importer(f"{nets}:encoder", batch=1)
    assert made.notes == ("batch fixed to 1 on request", "free axes: sequence")
    assert signature(made.graph)[0]["ids"] == [1, "sequence"]


def test_a_module_that_takes_one_sample_only(importer: Importer, nets: Path) -> None:
    made = importer(f"{nets}:rigid")
    assert made.notes[0].startswith("batch fixed to 1, because its forward raises ValueError")
    assert signature(made.graph)[0] == {"x": [1, 4]}


def test_the_same_network_has_the_same_digest_and_graph(importer: Importer, nets: Path) -> None:
    first, second, other = (importer(f"{nets}:{name}") for name in ("linear", "linear", "rigid"))
    assert first.source_digest == second.source_digest != other.source_digest
    assert Path(first.graph).read_bytes() == Path(second.graph).read_bytes()


def test_a_factory_runs_in_the_users_folder(
    importer: Importer, nets: Path, modules: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    torch.manual_seed(7)
    module = modules["Encoder"]()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    made = importer("mine:with_weights")
    feed = sentences(2, 4)
    assert close(answers(made.graph, feed)[0], torch_answers(module, *feed.values()).numpy())


def test_an_exported_program(importer: Importer, modules: dict[str, Any], tmp_path: Path) -> None:
    import torch

    path = tmp_path / "encoder.pt2"
    torch.export.save(modules["program"](), str(path))
    made = importer(path)
    assert made.kind == "PyTorch exported program"
    assert made.size_bytes == path.stat().st_size
    assert made.notes == ("free axes: batch, ids_1",)
    feed = sentences(3, 11)
    assert close(answers(made.graph, feed)[0], torch_answers(modules["encoder"]()[0], *feed.values()).numpy())


def test_an_exported_program_that_is_broken(importer: Importer, tmp_path: Path) -> None:
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"no archive")
    with pytest.raises(ModelError, match=r"torch\.export cannot load it"):
        importer(path)


def test_a_module_given_as_an_object_stays_as_it_is(importer: Importer, modules: dict[str, Any]) -> None:
    module = modules["picture"]()
    module.train()
    module.norm.eval()
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    made = importer(module, {"input": pixels})
    assert module.training
    assert not module.norm.training
    assert made.notes == ("free axes: batch",)
    assert close(answers(made.graph, {"input": pixels})[0], torch_answers(module, pixels)["score"].numpy())


def test_an_exported_program_given_as_an_object(importer: Importer, modules: dict[str, Any]) -> None:
    feed = sentences(3, 6)
    made = importer(modules["program"]())
    assert close(answers(made.graph, feed)[0], torch_answers(modules["encoder"]()[0], *feed.values()).numpy())


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("raises", r"raises FileNotFoundError: weights\.pt \(line \d+ of nets\.py\)"),
        ("leaves", "raises SystemExit: 3"),
        ("number", "returns int, no PyTorch module"),
        ("missing", "has no function 'missing'"),
        ("wants_more", "its forward raises TypeError on the example inputs"),
    ],
)
def test_factories_that_go_wrong(importer: Importer, nets: Path, factory: str, said: str) -> None:
    with pytest.raises(ModelError, match=said) as caught:
        importer(f"{nets}:{factory}")
    assert caught.value.remedy


def test_a_module_that_is_not_there(importer: Importer) -> None:
    with pytest.raises(ModelError, match="there is no module 'nowhere'"):
        importer("nowhere.nets:build")


def test_no_example_inputs(importer: Importer, nets: Path) -> None:
    with pytest.raises(ModelError, match="no example inputs"):
        importer(f"{nets}:bare_encoder")


def test_samples_of_other_names(importer: Importer, nets: Path) -> None:
    with pytest.raises(ModelError, match="no array 'attention_mask', which its forward takes"):
        importer(f"{nets}:bare_encoder", {"ids": np.zeros((2, 4), np.int64), "mask": np.ones((2, 4), np.int64)})


def test_an_operator_without_a_counterpart_is_named(importer: Importer, nets: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"'aten\.linalg_eig'"):
        importer(f"{nets}:eigen")
