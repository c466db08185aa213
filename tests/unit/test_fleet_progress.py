"""Where a device stands: done only on its own proof."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kedge.fleet.device_progress import LastReport, Standing, judge
from kedge.fleet.results import Progress
from kedge_protocol.messages import Failure, ModelState, ReportedModel, Served

WANTED, OTHER = "sha256:" + "a" * 64, "sha256:" + "b" * 64
digests = st.sampled_from([None, WANTED, OTHER])


def standing_of(
    model: ReportedModel | None, *, told: int | None, asked: int, wanted: str | None = WANTED, online: bool = True
) -> Standing:
    return judge(wanted=wanted, version=asked, told=LastReport(told, model, online))


models = st.builds(
    ReportedModel,
    state=st.sampled_from(ModelState),
    desired=digests,
    digest=digests,
    proved=st.booleans(),
    served=st.none() | st.builds(Served, calls=st.integers(0, 2), golden=st.integers(0, 2)),
    failure=st.one_of(
        st.none(), st.builds(Failure, digest=st.sampled_from([WANTED, OTHER]), stage=st.just("prove"), reason=st.text())
    ),
)


@given(model=models, version=st.integers(0, 5), asked=st.integers(1, 5), online=st.booleans())
def test_done_needs_this_digest_serving_proved_for_this_version_or_later(
    model: ReportedModel, version: int, asked: int, online: bool
) -> None:
    standing = standing_of(model, told=version, asked=asked, online=online)
    proof = model.state is ModelState.SERVING and model.digest == WANTED and model.proved and version >= asked
    proof = proof and (model.served is None or bool(model.served.calls or model.served.golden))
    assert (standing.progress is Progress.DONE) == proof
    if standing.progress is Progress.FAILED:
        assert model.failure is not None
        assert model.failure.digest == WANTED
        assert version >= asked
        assert model.failure.reason in standing.detail


@given(version=st.integers(1, 5), online=st.booleans())
def test_a_device_that_does_not_speak_of_the_model_is_not_done(version: int, online: bool) -> None:
    standing = standing_of(None, told=version, asked=1, online=online)
    assert standing.progress is (Progress.PENDING if online else Progress.OFFLINE)


@given(model=st.none() | models, told=st.none() | st.integers(0, 5), asked=st.integers(1, 5), wanted=digests)
def test_nothing_is_pending_or_away_without_a_word_why(
    model: ReportedModel | None, told: int | None, asked: int, wanted: str | None
) -> None:
    for online in (True, False):
        standing = standing_of(model, told=told, asked=asked, wanted=wanted, online=online)
        if standing.progress in (Progress.PENDING, Progress.OFFLINE, Progress.FAILED):
            assert standing.detail


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
    standing = standing_of(model, told=2, asked=2)
    assert (standing.progress, standing.serving, standing.blocks_done, standing.detail) == (progress, OTHER, 3, "so")
    before = standing_of(model, told=2, asked=3)
    assert before.progress is Progress.PENDING


def test_a_model_taken_away_is_done_when_the_device_says_that_it_is_gone() -> None:
    serving = ReportedModel(state=ModelState.SERVING, desired=OTHER, digest=OTHER, proved=True)
    for version, model, progress in (
        (2, None, Progress.DONE),
        (1, None, Progress.PENDING),
        (2, serving, Progress.PENDING),
    ):
        assert standing_of(model, told=version, asked=2, wanted=None).progress is progress


def test_a_device_never_heard_of_is_offline() -> None:
    standing = standing_of(None, told=None, asked=1, online=False)
    assert (standing.progress, standing.detail) == (Progress.OFFLINE, "it was never heard of")


def test_a_device_is_done_once_something_attests_that_it_serves_and_says_what() -> None:
    def standing(served: Served) -> Standing:
        model = ReportedModel(state=ModelState.SERVING, desired=WANTED, digest=WANTED, proved=True, served=served)
        return standing_of(model, told=2, asked=2)

    waiting, failing = standing(Served()), standing(Served(problem="refused"))
    assert waiting.progress is failing.progress is Progress.PROVING
    assert "waits for the first call" in waiting.detail
    assert "refused" in failing.detail
    golden, calls = standing(Served(golden=8)), standing(Served(calls=3, golden=8))
    assert golden.progress is calls.progress is Progress.DONE
    assert "8 golden samples held through its served endpoint" in golden.detail
    assert "calls of users" in calls.detail
