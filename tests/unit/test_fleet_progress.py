"""Where a device stands: done only on its own proof."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.progress import judge
from kedge.fleet.results import Progress
from kedge_protocol.messages import Failure, ModelState, Reported, ReportedModel

WANTED, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
digests = st.sampled_from([None, WANTED, OTHER])


def reported(version: int, models: dict[str, ReportedModel]) -> Reported:
    return Reported(
        boot_id="b",
        seq=1,
        target="t",
        agent_version="0",
        architecture="x",
        python="3",
        runtimes={},
        free_bytes=0,
        desired_version=version,
        models=models,
    )


models = st.builds(
    ReportedModel,
    state=st.sampled_from(ModelState),
    desired=digests,
    digest=digests,
    proved=st.booleans(),
    failure=st.one_of(
        st.none(), st.builds(Failure, digest=st.sampled_from([WANTED, OTHER]), stage=st.just("prove"), reason=st.text())
    ),
)


@given(model=models, version=st.integers(0, 5), asked=st.integers(1, 5), online=st.booleans())
def test_done_needs_this_digest_serving_proved_for_this_version_or_later(
    model: ReportedModel, version: int, asked: int, online: bool
) -> None:
    standing = judge(model="m", wanted=WANTED, version=asked, reported=reported(version, {"m": model}), online=online)
    proof = model.state is ModelState.SERVING and model.digest == WANTED and model.proved and version >= asked
    assert (standing.progress is Progress.DONE) == proof
    if standing.progress is Progress.FAILED:
        assert model.failure is not None
        assert model.failure.digest == WANTED
        assert version >= asked
        assert model.failure.reason in standing.detail


@given(models=st.dictionaries(st.sampled_from(["other", "third"]), models), online=st.booleans())
def test_another_models_proof_counts_for_nothing(models: dict[str, ReportedModel], online: bool) -> None:
    standing = judge(model="m", wanted=WANTED, version=1, reported=reported(9, models), online=online)
    assert standing.progress is (Progress.PENDING if online else Progress.OFFLINE)


@pytest.mark.parametrize(
    ("state", "progress"),
    [
        (ModelState.FETCHING, Progress.FETCHING),
        (ModelState.PROVING, Progress.PROVING),
        (ModelState.SWITCHING, Progress.PROVING),
        (ModelState.WAITING, Progress.PENDING),
    ],
)
def test_what_a_device_is_at_is_shown(state: ModelState, progress: Progress) -> None:
    model = ReportedModel(state=state, desired=WANTED, digest=OTHER, blocks_done=3, blocks_total=9, detail="so")
    standing = judge(model="m", wanted=WANTED, version=2, reported=reported(2, {"m": model}), online=True)
    assert (standing.progress, standing.serving, standing.blocks_done, standing.detail) == (progress, OTHER, 3, "so")
    before = judge(model="m", wanted=WANTED, version=3, reported=reported(2, {"m": model}), online=True)
    assert before.progress is Progress.PENDING


def test_a_model_taken_away_is_done_when_the_device_says_that_it_is_gone() -> None:
    serving = ReportedModel(state=ModelState.SERVING, desired=OTHER, digest=OTHER, proved=True)
    for version, models, progress in (
        (2, {}, Progress.DONE),
        (1, {}, Progress.PENDING),
        (2, {"m": serving}, Progress.PENDING),
    ):
        standing = judge(model="m", wanted=None, version=2, reported=reported(version, models), online=True)
        assert standing.progress is progress


def test_a_device_never_heard_of_is_offline() -> None:
    standing = judge(model="m", wanted=WANTED, version=1, reported=None, online=False)
    assert (standing.progress, standing.detail) == (Progress.OFFLINE, "it was never heard of")
