"""How fast a language model answers reaches the controller's gates: by the token, whatever the answers' lengths."""

from __future__ import annotations

import weakref
from pathlib import Path

from tests.support import decoders
from tests.support.installed import install
from tests.support.waiting import wait_for

from kedge.fleet.call_figures import Figures
from kedge_agent import Model
from kedge_agent.telemetry import Meter
from kedge_protocol import codec, latency_buckets
from kedge_protocol.messages import Telemetry


def test_an_answer_that_is_broken_off_is_no_error_and_holds_its_model_no_longer(tmp_path: Path) -> None:
    state = tmp_path / "state"
    folder = install(state, decoders.writer(tmp_path, slots=2, changed={"eos_token_id": None}))
    meter = Meter(state, "boot", 0.0)
    current = folder.current()
    assert current is not None
    digests = {"writer": current.digest}
    meter.measure(digests, [], 0, 1.0)
    with Model("writer", state=state) as model:
        streams = [model.generate("Once", stream=True, max_tokens=400) for _ in range(3)]
        for stream in streams[:2]:
            next(iter(stream))
            stream.close()
            assert stream.finish().reason == "cancelled"
        streams[2].close()
        assert streams[2].finish().reason == "cancelled"
        held = weakref.ref(model.loaded())
    wait_for(lambda: held() is None, what="the end of the engine's thread")
    told = meter.measure(digests, [], 0, 2.0).models["writer"]
    assert (told.errors, told.inferences) == (0, 3)


def test_telemetry_tells_first_tokens_and_tokens_of_each_answer_and_the_gates_figures_take_them(tmp_path: Path) -> None:
    release = decoders.writer(tmp_path, slots=2, changed={"eos_token_id": None})
    state = tmp_path / "state"
    folder = install(state, release)
    current = folder.current()
    assert current is not None
    digests = {"writer": current.digest}
    meter = Meter(state, "boot", 0.0)
    assert meter.measure(digests, [], 0, 1.0).models["writer"].generation is None
    with Model("writer", state=state) as model:
        answers = [model.generate("Once upon a time", max_tokens=most) for most in (1, 5, 200)]
    told = meter.measure(digests, [], 0, 2.0)
    paces = told.models["writer"].generation
    assert paces is not None
    assert sum(paces.first_token_buckets.values()) == 3
    # An answer of one token has no time of a further one.
    assert sum(paces.token_buckets.values()) == 2
    assert told.models["writer"].inferences == 3
    # No token takes longer than the longest answer, and none no time.
    most = latency_buckets.bucket_of(int(max(one.seconds for one in answers) * 1e9))
    assert all(0 < int(bucket) <= most for bucket in (*paces.token_buckets, *paces.first_token_buckets))
    assert meter.measure(digests, [], 0, 3.0).models["writer"].generation is None

    # As the controller reads it.
    read = codec.decode(codec.encode(told), Telemetry, where="test")
    figures = Figures(since=0.0, until=0.0)
    figures.add(10.0, read, read.models["writer"], count=True)
    figures.add(90.0, read, read.models["writer"], count=True)
    assert (figures.first.count, figures.p95.count, figures.calls.total) == (1, 1, 3)
