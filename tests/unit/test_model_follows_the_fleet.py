"""Switching under a running application: the next calls go to the new bundle, none fails, a bad one changes nothing."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge_agent import InputError, Model, loading
from kedge_agent.counters import collect
from kedge_protocol import memory
from kedge_targets.executor import Executor

pytestmark = pytest.mark.device


def _serves(model: Model, version: str) -> bool:
    return model.version == version


def test_a_call_after_a_switch_loads_the_new_bundle_in_the_background(tmp_path: Path) -> None:
    install(tmp_path, make_bundle(tmp_path, version="1.0"))
    model = Model("tiny", state=tmp_path)
    first = model(samples(2))
    folder = install(tmp_path, make_bundle(tmp_path, version="2.0", seed=5))

    def switched() -> bool:
        model(samples(2))
        return model.version == "2.0"

    wait_for(switched)
    second = model(samples(2))
    assert not np.allclose(first, second)
    assert model.failure is None
    current = folder.current()
    assert current is not None
    assert model.digest == current.digest
    np.testing.assert_array_equal(second, Model(tmp_path / "tiny-2.0", target="generic-cpu")(samples(2)))


def test_refresh_loads_at_once_and_follows_a_roll_back(tmp_path: Path) -> None:
    install(tmp_path, make_bundle(tmp_path, version="1.0"))
    model = Model("tiny", state=tmp_path)
    folder = install(tmp_path, make_bundle(tmp_path, version="2.0", seed=5))
    model.refresh()
    assert model.version == "2.0"
    folder.roll_back()
    model.refresh()
    assert model.version == "1.0"


def test_a_bundle_that_cannot_be_loaded_leaves_the_old_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(tmp_path, make_bundle(tmp_path, version="1.0"))
    model = Model("tiny", state=tmp_path)
    first = model(samples(2))
    folder = install(tmp_path, make_bundle(tmp_path, version="2.0", broken="file"))
    model.refresh()
    assert model.version == "1.0"
    assert model.failed_loads == 1
    assert "refuses the file" in str(model.failure)
    assert "the old one goes on" in caplog.text
    np.testing.assert_array_equal(model(samples(2)), first)
    assert collect(folder.counters).errors == 1
    # It is not tried again with each call, only when something else is switched to.
    model(samples(2))
    assert model.failed_loads == 1
    folder.roll_back()
    model.refresh()
    assert model.failure is None


def test_a_model_that_is_removed_goes_on_for_who_has_it(tmp_path: Path) -> None:
    folder = install(tmp_path, make_bundle(tmp_path))
    model = Model("tiny", state=tmp_path)
    folder.remove()
    model.refresh()
    assert model(samples(1)).shape == (1, 4)
    assert "taken off this device" in str(model.failure)
    with pytest.raises(InputError, match="Nothing is installed"):
        Model("tiny", state=tmp_path)


def test_threads_see_only_whole_bundles_and_no_call_fails(tmp_path: Path) -> None:
    releases = [make_bundle(tmp_path, version=f"{n}.0", seed=n) for n in range(3)]
    batch = samples(4)
    allowed = [Model(release, target="generic-cpu")(batch) for release in releases]
    install(tmp_path, releases[0])
    model = Model("tiny", state=tmp_path)
    stop = threading.Event()
    problems: list[object] = []
    calls = [0] * 4

    def work(index: int) -> None:
        while not stop.is_set():
            try:
                result = model(batch)
            except Exception as error:
                problems.append(error)
                raise
            calls[index] += 1
            if not any(np.array_equal(result, one) for one in allowed):
                problems.append(result)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(1, 7):
        folder = install(tmp_path, releases[turn % 3])
        wait_for(partial(_serves, model, f"{turn % 3}.0"))
        # One more than may have been under way: this bundle has answered too.
        enough = sum(calls) + len(threads)
        wait_for(lambda enough=enough: problems or sum(calls) > enough)  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join()
    assert problems == []
    found = collect(folder.counters)
    assert found.inferences == sum(calls)
    assert found.errors == 0
    assert len(found.digests) == 3


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "of_device", lambda: memory.DeviceMemory(total=1 << 30, available=1))


@pytest.mark.usefixtures("little_memory")
def test_where_memory_has_no_room_for_both_the_old_bundle_is_released_before_the_new_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, make_bundle(tmp_path, version="1.0"))
    model = Model("tiny", state=tmp_path)
    first = model(samples(2))
    old = weakref.ref(model.loaded())
    load: Callable[..., Any] = loading.load_slot
    there: list[object] = []

    def watched(*given: Any, **more: Any) -> Any:
        there.append(old())
        return load(*given, **more)

    monkeypatch.setattr(loading, "load_slot", watched)
    install(tmp_path, make_bundle(tmp_path, version="2.0", seed=5))
    # The first call of these finds that the bundle was switched; none fails, and all but the first few wait.
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: model(samples(2)), range(200)))
    wait_for(partial(_serves, model, "2.0"))
    second = Model(tmp_path / "tiny-2.0", target="generic-cpu")(samples(2))
    assert all(np.array_equal(one, first) or np.array_equal(one, second) for one in answers)
    assert there == [None]


@pytest.mark.usefixtures("little_memory")
def test_a_released_bundle_is_loaded_again_if_the_new_one_cannot_be(tmp_path: Path) -> None:
    install(tmp_path, make_bundle(tmp_path, version="1.0"))
    model = Model("tiny", state=tmp_path)
    first = model(samples(2))
    install(tmp_path, make_bundle(tmp_path, version="2.0", broken="file"))
    model.loaded()
    wait_for(lambda: model.failure is not None)
    assert model.version == "1.0"
    np.testing.assert_array_equal(model(samples(2)), first)


def test_a_bundle_is_warmed_up_before_it_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    run = Executor.run

    def recorded(self: Executor, raw: Any) -> Any:
        calls.append(not np.any(raw[0]))
        return run(self, raw)

    monkeypatch.setattr(Executor, "run", recorded)
    folder = install(tmp_path / "state", make_bundle(tmp_path, version="1.0"))
    with Model("tiny", state=tmp_path / "state") as model:
        assert calls == [True]
        before = model.loaded()
        install(tmp_path / "state", make_bundle(tmp_path, version="2.0", seed=2))
        model.refresh()
        assert calls == [True, True]
        assert (before.version, model.loaded().version) == ("1.0", "2.0")
        assert before.digest != model.loaded().digest == model.digest
        # Warming up is no inference.
        assert collect(folder.counters).inferences == 0
        np.testing.assert_array_equal(asyncio.run(model.call_async(samples(1))), model(samples(1)))
