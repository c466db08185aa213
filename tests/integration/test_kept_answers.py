"""Answers that are kept, over gRPC and HTTP: ``kedge-agent serve --cache-mib``, asked by NVIDIA's tritonclient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.bundles import make_bundle, samples
from tests.support.ports import free_port
from tests.support.standalone import serving
from tests.support.waiting import wait_for

pytest.importorskip("tritonclient", reason="pip install --no-deps -r constraints/proofs.txt")


def test_a_request_that_comes_again_is_answered_from_memory(tmp_path: Path) -> None:
    import tritonclient.grpc
    import tritonclient.http

    grpc = f"127.0.0.1:{free_port()}"
    with serving(str(make_bundle(tmp_path)), "--listen", "127.0.0.1:0", "--grpc", grpc, "--cache-mib", "4") as served:
        served.wait()
        clients: list[tuple[Any, Any]] = [
            (tritonclient.grpc, tritonclient.grpc.InferenceServerClient(grpc)),
            (tritonclient.http, tritonclient.http.InferenceServerClient(f"127.0.0.1:{served.port}")),
        ]
        wait_for(clients[0][1].is_server_ready)
        for number, (module, client) in enumerate(clients):
            found = []
            for row, name in ((0, "one"), (0, "two"), (1, "three")):
                tensor = module.InferInput("input", [1, 16], "FP32")
                tensor.set_data_from_numpy(samples(2)[row : row + 1])
                result = client.infer("tiny", [tensor], request_id=name if number == 0 else "")
                found.append(result.as_numpy("scores"))
                if number == 0:
                    assert result.get_response().id == name
            np.testing.assert_array_equal(found[0], found[1])
            assert not np.array_equal(found[0], found[2])
            (row_of,) = served.ask("GET", "/v2/models/tiny/stats")[1]["model_stats"]
            stats = row_of["inference_stats"]
            assert (stats["cache_hit"]["count"], stats["cache_miss"]["count"]) == (number + 1, 2 * number + 2)
            assert stats["success"]["count"] == 3 * (number + 1)
