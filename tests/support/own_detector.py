"""A detector of our own training, built as YOLOv8 is: a backbone with SiLU, two scales, an anchor-free head that gives
distributions of a box's edges and a score for each class. Trained on :mod:`tests.support.shapes`, once, and kept."""

from __future__ import annotations

import fcntl
import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support import detections, foreign, photos, shapes
from tests.support.detections import Found

Array = npt.NDArray[Any]

CLASSES = len(shapes.KINDS)
STRIDES = (8, 16)
_BINS = 12
"""Of the distribution of an edge's distance, in strides."""
_WIDTH = 16
_BATCH = 16
_RATE = 4e-3
_DISTINCT = 3000
"""Pictures that are drawn; each is seen again, mirrored or turned."""
_TRAIN_SEED, _JUDGE_SEED, _CALIBRATE_SEED = 11, 12, 13


def trained(steps: int = 2000) -> Path:
    """The ONNX file: ``images`` float32 N x 3 x 128 x 128 in 0..1 to ``output0`` N x (4 + classes) x anchors.

    Args:
        steps: of training; a file is kept for each number, and for each form of this module.
    """
    parts = [inspect.getsource(module) for module in (shapes, photos)] + [Path(__file__).read_text(), str(steps)]
    name = hashlib.sha256("".join(parts).encode()).hexdigest()[:16]
    made = foreign.folder() / f"own-detector-{name}.onnx"
    with made.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.is_file():
            export(train(steps), made)
    return made


def judged(count: int = 700) -> tuple[Array, list[Found]]:
    """Fresh pictures, float32 in 0..1, and what is on them."""
    pixels, truth = shapes.pictures(count, seed=_JUDGE_SEED)
    return pixels.astype(np.float32) / 255, truth


def calibration(count: int = 128) -> Array:
    """Other pictures, float32 in 0..1."""
    return shapes.pictures(count, seed=_CALIBRATE_SEED)[0].astype(np.float32) / 255


def precisions(outputs: Array, truth: list[Found]) -> detections.Precisions:
    """Of the model's outputs."""
    got = [detections.decoded(one, score=0.01, same=0.6, most=100) for one in outputs]
    return detections.precisions(truth, got, CLASSES)


def network() -> Any:
    """Untrained; in training it gives logits of edges N x 4 x bins x anchors, and of classes N x classes x anchors."""
    import torch
    from torch import nn

    class Conv(nn.Sequential):  # type: ignore[misc, name-defined]
        def __init__(self, given: int, made: int, kernel: int = 1, stride: int = 1) -> None:
            super().__init__(
                nn.Conv2d(given, made, kernel, stride, kernel // 2, bias=False),
                nn.BatchNorm2d(made, eps=1e-3, momentum=0.03),
                nn.SiLU(),
            )

    class C2f(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self, given: int, made: int, *, added: bool) -> None:
            super().__init__()
            self.half, self.added = made // 2, added
            self.first, self.last = Conv(given, made), Conv(made + self.half, made)
            self.inner = nn.Sequential(Conv(self.half, self.half, 3), Conv(self.half, self.half, 3))

        def forward(self, x: Any) -> Any:
            kept, through = self.first(x).split(self.half, 1)
            made = self.inner(through)
            return self.last(torch.cat([kept, through, through + made if self.added else made], 1))

    class Detector(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            w = _WIDTH
            self.stem = nn.Sequential(Conv(3, w, 3, 2), Conv(w, 2 * w, 3, 2), C2f(2 * w, 2 * w, added=True))
            self.mid = nn.Sequential(Conv(2 * w, 3 * w, 3, 2), C2f(3 * w, 3 * w, added=True))
            self.deep = nn.Sequential(Conv(3 * w, 4 * w, 3, 2), C2f(4 * w, 4 * w, added=True))
            self.up = nn.Upsample(scale_factor=2.0)
            self.mid_up = C2f(7 * w, 3 * w, added=False)
            widths = (3 * w, 4 * w)
            self.edges = nn.ModuleList(
                nn.Sequential(Conv(n, 2 * w, 3), Conv(2 * w, 2 * w, 3), nn.Conv2d(2 * w, 4 * _BINS, 1)) for n in widths
            )
            self.scores = nn.ModuleList(
                nn.Sequential(Conv(n, 2 * w, 3), Conv(2 * w, 2 * w, 3), nn.Conv2d(2 * w, CLASSES, 1)) for n in widths
            )
            for edges, scores in zip(self.edges, self.scores, strict=True):
                nn.init.constant_(edges[-1].bias, 1.0)
                nn.init.constant_(scores[-1].bias, -5.0)
            middles, strides = grid()
            self.register_buffer("middles", torch.tensor(middles.T[None] / strides))
            self.register_buffer("strides", torch.tensor(strides))
            self.register_buffer("bins", torch.arange(_BINS, dtype=torch.float32).view(1, 1, _BINS, 1))

        def forward(self, images: Any) -> Any:
            mid = self.mid(self.stem(images))
            deep = self.deep(mid)
            mid = self.mid_up(torch.cat([self.up(deep), mid], 1))
            # As YOLOv8 has it: edges and scores of one scale in one tensor, then all scales, then apart again.
            each = [
                torch.cat([edges(x), scores(x)], 1).flatten(2)
                for edges, scores, x in zip(self.edges, self.scores, (mid, deep), strict=True)
            ]
            edges, scores = torch.cat(each, 2).split((4 * _BINS, CLASSES), 1)
            edges = edges.unflatten(1, (4, _BINS))
            if self.training:
                return edges, scores
            distances = (edges.softmax(2) * self.bins).sum(2)
            least, most = self.middles - distances[:, :2], self.middles + distances[:, 2:]
            boxes = torch.cat([(least + most) / 2, most - least], 1) * self.strides
            return torch.cat([boxes, scores.sigmoid()], 1)

    return Detector()


def grid() -> tuple[Array, Array]:
    """Middles of all anchors in pixels, A x 2, and their strides, A."""
    middles, strides = [], []
    for stride in STRIDES:
        ticks = (np.arange(shapes.SIZE // stride) + 0.5) * stride
        across, down = np.meshgrid(ticks, ticks)
        middles.append(np.stack([across.ravel(), down.ravel()], axis=1))
        strides.append(np.full(across.size, stride))
    return np.concatenate(middles).astype(np.float32), np.concatenate(strides).astype(np.float32)


def train(steps: int) -> Any:
    """A network trained so many steps of :data:`_BATCH` pictures, in evaluation mode."""
    import torch

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    pixels, truth = shapes.pictures(min(_DISTINCT, steps * _BATCH), seed=_TRAIN_SEED)
    model = network().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        chosen = rng.integers(0, len(pixels), _BATCH)
        pictures, objects = zip(*(_turned(pixels[i], truth[i], rng) for i in chosen), strict=True)
        edges, scores = model(torch.from_numpy(np.stack(pictures).astype(np.float32) / 255))
        optimizer.zero_grad()
        _loss(model, edges, scores, list(objects)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def _turned(pixels: Array, truth: Found, rng: np.random.Generator) -> tuple[Array, Found]:
    """Mirrored or not, turned by a quarter or not."""
    boxes = truth.boxes
    if rng.random() < 0.5:
        pixels = pixels[:, :, ::-1]
        boxes = np.stack([shapes.SIZE - boxes[:, 2], boxes[:, 1], shapes.SIZE - boxes[:, 0], boxes[:, 3]], axis=1)
    if rng.random() < 0.5:
        pixels, boxes = pixels.transpose(0, 2, 1), boxes[:, [1, 0, 3, 2]]
    return pixels, Found(boxes, truth.scores, truth.classes)


def _loss(model: Any, edges: Any, scores: Any, truth: list[Found]) -> Any:
    """Of one batch: generalized overlap and distribution focal loss of the boxes, binary cross entropy of the scores
    against the overlap that an anchor has reached (task-aligned assignment of TOOD, as YOLOv8 takes it)."""
    import torch
    from torch.nn import functional

    middles, strides = model.middles[0].T, model.strides
    distances = (edges.softmax(2) * model.bins).sum(2).transpose(1, 2)
    boxes = torch.cat([middles - distances[..., :2], middles + distances[..., 2:]], 2) * strides[:, None]
    wanted = torch.zeros_like(scores)
    overlap_loss = distribution_loss = torch.zeros(())
    weight = 0.0
    for index, objects in enumerate(truth):
        if not len(objects.boxes):
            continue
        given = torch.tensor(objects.boxes, dtype=torch.float32)
        kinds = torch.tensor(objects.classes)
        with torch.no_grad():
            anchors, owners, targets = _assigned(middles * strides[:, None], boxes[index], scores[index], given, kinds)
        if not len(anchors):
            continue
        wanted[index, kinds[owners], anchors] = targets
        mine, theirs = boxes[index, anchors], given[owners]
        overlap_loss = overlap_loss + (targets * (1 - _overlap(mine, theirs, enclosed=True))).sum()
        at, stride = middles[anchors], strides[anchors, None]
        reach = torch.cat([at - theirs[:, :2] / stride, theirs[:, 2:] / stride - at], 1).clamp(0, _BINS - 1.01)
        below = reach.floor()
        logs = edges[index, :, :, anchors].permute(2, 0, 1).log_softmax(2)
        share = (reach - below).unsqueeze(2)
        near = logs.gather(2, below.long().unsqueeze(2)) * (1 - share)
        near = near + logs.gather(2, below.long().unsqueeze(2) + 1) * share
        distribution_loss = distribution_loss - (targets * near.mean((1, 2))).sum()
        weight += float(targets.sum())
    score_loss = functional.binary_cross_entropy_with_logits(scores, wanted, reduction="sum")
    return (7.5 * overlap_loss + 1.5 * distribution_loss + 0.5 * score_loss) / max(weight, 1.0)


def _assigned(middles: Any, boxes: Any, scores: Any, given: Any, kinds: Any) -> tuple[Any, Any, Any]:
    """Anchors that answer for an object, which one, and the score they ought to have."""
    import torch

    inside = ((middles > given[:, None, :2]) & (middles < given[:, None, 2:])).all(2)
    overlap = _overlap(boxes[None], given[:, None]).clamp(0) * inside
    align = scores.sigmoid()[kinds].sqrt() * overlap**6 + 1e-9 * inside
    best = align.topk(min(10, align.shape[1]), dim=1)
    taken = torch.zeros_like(align).scatter_(1, best.indices, 1.0) * inside
    align = align * taken
    owners = (overlap * taken + 1e-9 * taken).argmax(0)
    anchors = taken.amax(0).nonzero()[:, 0]
    owners = owners[anchors]
    most, reached = align.amax(1), (overlap * taken).amax(1)
    targets = align[owners, anchors] * reached[owners] / most[owners].clamp(min=1e-9)
    return anchors, owners, targets.clamp(0, 1)


def _overlap(first: Any, second: Any, *, enclosed: bool = False) -> Any:
    """Intersection over union, broadcast; less the empty share of the enclosing box where that is asked for."""
    import torch

    both = (torch.minimum(first[..., 2:], second[..., 2:]) - torch.maximum(first[..., :2], second[..., :2])).clamp(0)
    inner = both.prod(-1)
    union = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1) - inner
    found = inner / union.clamp(min=1e-6)
    if not enclosed:
        return found
    hull = torch.maximum(first[..., 2:], second[..., 2:]) - torch.minimum(first[..., :2], second[..., :2])
    area = hull.prod(-1).clamp(min=1e-6)
    return found - (area - union) / area


def export(model: Any, path: Path) -> None:
    """Write it as ONNX, its batch free."""
    import torch

    torch.onnx.export(
        model,
        (torch.rand(2, 3, shapes.SIZE, shapes.SIZE),),
        str(path),
        dynamo=True,
        external_data=False,
        input_names=["images"],
        output_names=["output0"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
        verbose=False,
    )
