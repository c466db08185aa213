"""The Open Inference Protocol without a socket: what is answered, with which status."""

from __future__ import annotations

import http.client
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.bundles import CLASSES, make_bundle, samples
from tests.support.installed import install
from tests.support.serving import ask
from tests.support.waiting import wait_for

from kedge_agent.generation.openai import OpenAiHandler
from kedge_agent.loaded import Loaded
from kedge_agent.serving import json_tensors
from kedge_agent.serving.datatypes import DATATYPES
from kedge_agent.serving.http_server import HttpServer
from kedge_agent.serving.json_tensors import array_of
from kedge_agent.serving.model_pool import ServedModels
from kedge_agent.serving.open_inference import InferenceHandler
from kedge_agent.serving.settings import ServerSettings, listening_socket
from kedge_protocol.errors import InputError

pytestmark = pytest.mark.device


@pytest.fixture(scope="module")
def handler(tmp_path_factory: pytest.TempPathFactory) -> InferenceHandler:
    folder = tmp_path_factory.mktemp("models")
    install(folder / "state", make_bundle(folder, "tiny", labels=("a", "b", "c", "d")))
    install(folder / "state", make_bundle(folder, "double", double=True))
    install(folder / "state", make_bundle(folder, "bad", broken="file"))
    models = ServedModels(folder / "state")
    models.scan()
    return InferenceHandler(models)


def _body(**changes: Any) -> bytes:
    tensor = {"name": "input", "shape": [2, 16], "datatype": "FP32", "data": samples(2).ravel().tolist()}
    return json.dumps({"inputs": [{**tensor, **changes}]}).encode()


def test_the_server_and_its_health(handler: InferenceHandler) -> None:
    assert ask(handler, "GET", "/v2").body["name"] == "kedge-agent"
    assert ask(handler, "GET", "/v2/health/live").status == 200
    ready = ask(handler, "GET", "/v2/health/ready")
    assert ready.status == 503
    assert "bad" in ready.body["error"]
    assert "tiny" not in ready.body["error"]


def test_before_the_first_scan_nothing_is_ready(tmp_path: Path) -> None:
    handler = InferenceHandler(ServedModels(tmp_path))
    assert ask(handler, "GET", "/v2/health/live").status == 200
    for path in ("/v2/health/ready", "/v2/models/tiny"):
        answer = ask(handler, "GET", path)
        assert (answer.status, answer.fields["Retry-After"]) == (503, "1")


def test_a_request_that_comes_before_its_model_is_loaded_waits_for_it(tmp_path: Path) -> None:
    """As after a restart: the process answers health, and loads."""
    install(tmp_path / "state", make_bundle(tmp_path))
    models = ServedModels(tmp_path / "state")
    handler = InferenceHandler(models, call_seconds=600.0)
    listening = listening_socket("127.0.0.1:0")
    server = HttpServer([listening], [("/v2", handler)], ServerSettings())
    thread = threading.Thread(target=server.run)
    thread.start()

    def asked(method: str, path: str, body: bytes | None = None) -> int:
        connection = http.client.HTTPConnection(*listening.getsockname(), timeout=60)
        connection.request(method, path, body)
        return connection.getresponse().status

    try:
        with ThreadPoolExecutor() as clients:
            paths = ["/v2/models/tiny/infer"] * 3 + ["/v2/models/none/infer"]
            answers = [clients.submit(asked, "POST", path, _body()) for path in paths]
            wait_for(lambda: handler.loading.waiting + handler.loading.running >= len(paths))
            assert asked("GET", "/v2/health/live") == 200
            assert asked("GET", "/v2/health/ready") == 503
            assert not any(answer.done() for answer in answers)
            models.scan()
            assert [answer.result() for answer in answers] == [200, 200, 200, 404]
    finally:
        models.first_scan.set()
        server.stop()
        thread.join(60)
        listening.close()


def test_a_request_for_text_waits_for_the_models_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = ServedModels(tmp_path)
    monkeypatch.setattr(models, "wait_for", lambda *_: models.scan())
    body = json.dumps({"model": "none", "prompt": "a"}).encode()
    assert ask(OpenAiHandler(models), "POST", "/v1/completions", body).status == 404


def test_a_device_without_models_is_ready(tmp_path: Path) -> None:
    models = ServedModels(tmp_path)
    models.scan()
    assert ask(InferenceHandler(models), "GET", "/v2/health/ready").status == 200
    assert ask(InferenceHandler(models), "GET", "/v2/models/tiny").status == 404


@pytest.mark.parametrize("path", ["/v2/models/tiny", "/v2/models/tiny/versions/1.0", "/v2/models/tiny?x=1"])
def test_metadata_say_what_the_model_takes(handler: InferenceHandler, path: str) -> None:
    answer = ask(handler, "GET", path)
    assert answer.status == 200
    assert answer.body["versions"] == ["1.0"]
    assert answer.body["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 16]}]
    assert answer.body["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": [-1, CLASSES]}]
    assert answer.body["parameters"]["labels"] == ["a", "b", "c", "d"]


def test_inference_gives_what_the_model_gives(handler: InferenceHandler) -> None:
    model = handler._models.get("tiny")
    assert model is not None
    assert model.model is not None
    expected = model.model(samples(2))
    for body in (_body(), _body(data=samples(2).tolist())):
        answer = ask(handler, "POST", "/v2/models/tiny/infer", body)
        assert answer.status == 200
        (output,) = answer.body["outputs"]
        assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [2, CLASSES])
        np.testing.assert_array_equal(np.array(output["data"], dtype=np.float32).reshape(2, -1), expected)


def test_id_version_and_chosen_outputs_come_back(handler: InferenceHandler) -> None:
    inputs = [
        {"name": "offset", "shape": [1, 4], "datatype": "INT8", "data": [1, -2, 3, 4]},
        {"name": "input", "shape": [1, 16], "datatype": "FP64", "data": samples(1).ravel().tolist()},
    ]
    body = json.dumps({"id": "7", "inputs": inputs, "outputs": [{"name": "hidden"}]}).encode()
    answer = ask(handler, "POST", "/v2/models/double/versions/1.0/infer", body)
    assert answer.status == 200
    assert (answer.body["id"], answer.body["model_name"], answer.body["model_version"]) == ("7", "double", "1.0")
    assert [output["name"] for output in answer.body["outputs"]] == ["hidden"]
    both = ask(handler, "POST", "/v2/models/double/infer", json.dumps({"inputs": inputs}).encode())
    assert [output["name"] for output in both.body["outputs"]] == ["scores", "hidden"]


@pytest.mark.parametrize("datatype", sorted(set(DATATYPES) - {"BYTES"}))
def test_every_datatype_is_taken(handler: InferenceHandler, datatype: str) -> None:
    data = [True, False] * 8 if datatype == "BOOL" else [1] * 16
    answer = ask(handler, "POST", "/v2/models/tiny/infer", _body(shape=[1, 16], datatype=datatype, data=data))
    assert answer.status == 200, answer.body


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "brackets"),
        (b"[0," * 100_000, "too deep|not JSON|brackets"),
        (b"[]", "not a JSON object"),
        (b"{}", "'inputs'"),
        (b'{"inputs":{}}', "'inputs'"),
        (b'{"inputs":[1]}', "'inputs'"),
        (b'{"inputs":[{}]}', "no name"),
        (b'{"inputs":[]}', "none were given"),
        (_body(name="other"), "other"),
        (_body(datatype="BYTES"), "BYTES"),
        (_body(datatype="BYTES", data=["x"] * 32), "not text"),
        (_body(datatype="FP16", data=[1e6] * 32), "out of the range of FP16"),
        (_body(datatype="FP64", data=[1e300] * 32), "out of the range of FP32"),
        (_body(data=[True] * 32), "not of datatype FP32"),
        (_body(data=[1.0, True] * 16), "true or false"),
        (_body(datatype=[]), "datatype"),
        (_body(shape=[2, -16]), "'shape'"),
        (_body(shape=[2.0, 16]), "'shape'"),
        (_body(shape=[1] * 40), "'shape'"),
        (_body(shape=None), "'shape'"),
        # No data fill them, but numpy cannot count them.
        (_body(shape=[0, 1 << 62], data=[]), "no tensor has"),
        (_body(shape=[1 << 62, 0], datatype="BYTES", data=[]), "no tensor has"),
        (_body(shape=[3, 16]), "do not fill"),
        (_body(shape=[1 << 60, 1 << 60]), "do not fill"),
        (_body(shape=[4, 8]), "does not fit"),
        (_body(shape=[16, 2], data=samples(2).tolist()), "nested"),
        (_body(data=None), "'data'"),
        (_body(data=["x"] * 32), "FP32"),
        (_body(data=[[1.0], [1.0, 2.0]]), "no tensor"),
        (_body(datatype="INT8", data=[0.5] * 32), "not of datatype"),
        (_body(datatype="INT8", data=[300] * 32), "range"),
        (_body(datatype="UINT8", data=[-1] * 32), "range"),
        (_body(datatype="BOOL", data=[1] * 32), "not of datatype"),
        (_body().replace(b"[2, 16]", b'[2, 16], "x": NaN'), "not JSON"),
        (_body()[:-1] + b',"outputs":[{"name":"nope"}]}', "no output"),
        (_body()[:-1] + b',"outputs":7}', "'outputs'"),
        # A number would not come back with the answer, which a client that waits for it would never find.
        (_body()[:-1] + b',"id":7}', "'id' is no text"),
    ],
)
def test_bad_requests_are_400_and_say_why(handler: InferenceHandler, body: bytes, says: str) -> None:
    answer = ask(handler, "POST", "/v2/models/tiny/infer", body)
    assert answer.status == 400
    assert set(answer.body) == {"error"}
    assert re.search(says, answer.body["error"])


@pytest.mark.parametrize("datatype", ["FP32", "BF16", "BOOL", "BYTES"])
def test_a_shape_that_nothing_fills_is_refused_as_bytes_too(handler: InferenceHandler, datatype: str) -> None:
    tensor = {"name": "input", "datatype": datatype, "shape": [1 << 62, 0], "parameters": {"binary_data_size": 0}}
    head = json.dumps({"inputs": [tensor]}).encode()
    answer = ask(handler, "POST", "/v2/models/tiny/infer", head, **{"inference_header_content_length": str(len(head))})
    assert (answer.status, "no tensor has" in answer.body["error"]) == (400, True)


def test_null_is_as_if_left_out(handler: InferenceHandler) -> None:
    # Clients with data classes write what they do not set as null.
    request = json.loads(_body(parameters=None))
    absent = {"binary_data": None, "classification": None}
    request |= {"id": None, "outputs": [{"name": "scores", "parameters": absent}]}
    request["parameters"] = {"binary_data_output": None}
    whole = {**request, "outputs": None, "parameters": None}
    plain = ask(handler, "POST", "/v2/models/tiny/infer", _body())
    for one in (request, whole):
        assert ask(handler, "POST", "/v2/models/tiny/infer", json.dumps(one).encode()).raw == plain.raw


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v1/models/tiny", 404),
        ("GET", "/v2/health", 404),
        ("GET", "/v2/models", 404),
        ("GET", "/v2/models/none", 404),
        ("GET", "/v2/models/../tiny", 404),
        ("GET", "/v2/models/tiny/versions/9", 404),
        ("GET", "/v2/models/tiny/versions", 404),
        ("POST", "/v2/models/tiny/versions", 404),
        ("GET", "/v2/models/tiny/nothing", 404),
        ("POST", "/v2/models/none/infer", 404),
        ("GET", "/v2/models/tiny/infer", 405),
        ("POST", "/v2/models/tiny", 405),
        ("POST", "/v2", 405),
        ("GET", "/v2/models/bad", 503),
        ("GET", "/v2/models/bad/ready", 503),
        ("POST", "/v2/models/bad/infer", 503),
        ("GET", "/v2/models/tiny/ready", 200),
        ("GET", "/v2/models/tiny/versions/1.0/ready", 200),
    ],
)
def test_paths_and_methods(handler: InferenceHandler, method: str, path: str, status: int) -> None:
    answer = ask(handler, method, path, _body())
    assert answer.status == status
    assert ("error" in answer.body) == (status != 200)
    assert ("Retry-After" in answer.fields) == (status == 503)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["name", "data"]), inner, max_size=2),
    max_leaves=8,
)
_TENSOR = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("name", "shape", "data", "datatype"), _JSON) | {"name": st.just("input")}
)


@given(st.dictionaries(st.sampled_from(["inputs", "outputs", "id"]), _JSON | st.lists(_TENSOR, max_size=3)))
@settings(max_examples=200, deadline=None)
def test_no_request_is_a_server_error(handler: InferenceHandler, request_body: dict[str, Any]) -> None:
    answer = ask(handler, "POST", "/v2/models/tiny/infer", json.dumps(request_body).encode())
    assert answer.status in (200, 400, 422)


_NEARLY = st.fixed_dictionaries(
    {
        "name": st.just("input"),
        "shape": st.lists(st.sampled_from([0, 1, 2, 16, 1 << 31, 1 << 62]), max_size=4),
        "datatype": st.sampled_from(sorted(DATATYPES)),
        "data": st.just([])
        | st.lists(st.sampled_from([0, 1, True, 1.5, -1, 1 << 63, 1e38, "x", None, []]), max_size=2)
        | st.sampled_from([[value] * 16 for value in (0, 1.5, True, "x", 1e38, 1 << 63)]),
    }
)


@given(st.lists(_NEARLY, min_size=1, max_size=2), st.booleans())
@settings(max_examples=300, deadline=None)
def test_no_tensor_is_a_server_error(handler: InferenceHandler, inputs: list[dict[str, Any]], classes: bool) -> None:
    request: dict[str, Any] = {"inputs": inputs}
    if classes:
        request["outputs"] = [{"name": "scores", "parameters": {"classification": 9}}]
    assert ask(handler, "POST", "/v2/models/tiny/infer", json.dumps(request).encode()).status in (200, 400, 422)


_BINARY = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["input", "input", "input", "other", 3]),
        "shape": st.sampled_from([[1, 16], [2, 16], [16], [-1, 16], "x"]),
        "datatype": st.sampled_from(["FP32", "FP32", "FP64", "INT32", "FP99"]),
        "parameters": st.sampled_from([{"binary_data_size": size} for size in (64, 128, 63, -1, True, "64")] + [7]),
    },
    optional={"data": st.just([1.0])},
)


@given(
    st.lists(_BINARY | st.none(), min_size=1, max_size=2),
    st.fixed_dictionaries(
        {}, optional={"id": st.sampled_from(["a", 1]), "parameters": st.sampled_from([{"binary_data_output": True}, 3])}
    ),
    st.sampled_from([64, 128, 192, 0]),
)
@settings(max_examples=300, deadline=None)
def test_what_is_remembered_of_a_binary_request_does_not_change_its_answer(
    handler: InferenceHandler, inputs: list[Any], more: dict[str, Any], size: int
) -> None:
    header = json.dumps({"inputs": inputs, **more}).encode()
    tensors = samples(4).tobytes()[:size]
    answers = []
    for head in (header, header, header + b" " * 2000):  # what is long is not remembered
        fields = {"inference_header_content_length": str(len(head))}
        answers.append(ask(handler, "POST", "/v2/models/tiny/infer", head + tensors, **fields))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0].status in (200, 400)


def test_a_result_that_json_cannot_say_is_not_sent_as_if_it_could(handler: InferenceHandler) -> None:
    body = _body(shape=[1, 16], data=[3.4e38] * 16)
    answer = ask(handler, "POST", "/v2/models/tiny/infer", body)
    assert answer.status == 422
    assert answer.body["error"].startswith("output 'scores' holds NaN or infinity")
    asked = b'{"parameters":{"binary_data_output":true},'
    answer = ask(handler, "POST", "/v2/models/tiny/infer", body.replace(b"{", asked, 1))
    assert answer.status == 200
    found = np.frombuffer(answer.raw[-4 * CLASSES :], np.float32)
    assert not np.isfinite(found).all()


def test_bytes_that_are_no_text_are_not_sent_as_json() -> None:
    given = np.asarray([b"ok", b"\xff"], object)
    with pytest.raises(ValueError, match="no UTF-8"):
        json_tensors.data_of(given)


TOP = (1 << 64) - 1


@pytest.mark.parametrize(
    ("datatype", "data"),
    [
        ("UINT64", [1 << 63]),
        ("UINT64", [1, 1 << 63]),
        ("UINT64", [0, TOP]),
        ("UINT64", [[1, TOP], [(1 << 63) - 1, (1 << 63) + 1]]),
        ("INT64", [-(1 << 63), (1 << 63) - 1]),
        ("FP64", [1 << 63, 1.5]),
        ("FP64", [1 << 80]),
    ],
)
def test_whole_numbers_are_taken_exactly_up_to_the_datatypes_ends(datatype: str, data: list[Any]) -> None:
    wanted = np.array(data, dtype=object)
    found = array_of({"datatype": datatype, "shape": list(wanted.shape), "data": data}, where="x")
    assert found.dtype == DATATYPES[datatype]
    assert found.tolist() == (wanted.tolist() if datatype != "FP64" else wanted.astype("float64").tolist())


@pytest.mark.parametrize(
    ("datatype", "data", "words"),
    [
        ("UINT64", [-1, 1 << 63], "out of the range"),
        ("UINT64", [1 << 64], "out of the range"),
        ("INT64", [1, 1 << 63], "out of the range"),
        ("INT64", [-(1 << 63) - 1], "out of the range"),
        ("UINT64", [1.0, 1 << 63], "not of datatype"),
        ("UINT8", [1.5], "not of datatype"),
        ("FP64", [10**400], "out of the range"),
        ("FP64", [None, 1 << 80], "not of datatype"),
        ("BOOL", [1 << 80], "not of datatype|out of the range"),
    ],
)
def test_numbers_beyond_them_are_refused(datatype: str, data: list[Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        array_of({"datatype": datatype, "shape": [len(data)], "data": data}, where="x")


def test_the_label_of_an_answer_is_of_the_bundle_that_computed_it(tmp_path: Path) -> None:
    state = tmp_path / "state"
    install(state, make_bundle(tmp_path, version="1.0"))
    models = ServedModels(state)
    models.scan()
    entry = models.get("tiny")
    assert entry is not None
    assert entry.model is not None
    model = entry.model
    old = model(samples(2))
    taken = model.loaded()
    install(state, make_bundle(tmp_path, version="2.0", seed=5))

    def switched_amid_the_request() -> Loaded:
        model.refresh()
        return taken

    model.loaded = switched_amid_the_request  # type: ignore[method-assign]
    answer = ask(InferenceHandler(models), "POST", "/v2/models/tiny/infer", _body())
    assert answer.body["model_version"] == "1.0"
    np.testing.assert_array_equal(np.float32(answer.body["outputs"][0]["data"]), old.ravel())
    del model.loaded
    assert model.version == "2.0"
    told = ask(InferenceHandler(models), "GET", "/v2/models/tiny").body
    assert told["versions"] == ["2.0"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":0.1,"b":[1,2.5,-0,1e-7],"c":"\xc3\xa4"}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":"\\ud800"}',
        b'{"a":1,}',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":01}',
        b"[1]",
    ],
)
def test_the_standard_library_takes_and_gives_what_orjson_does(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    found: list[object] = []
    for library in (json_tensors.orjson, None):
        monkeypatch.setattr(json_tensors, "orjson", library)
        try:
            found.append(json_tensors.parse(body, ()))
        except InputError:
            found.append(InputError)
    assert found[0] == found[1]
    array = np.float32([0.1, 1e-7, 3.4e38, -0.0, 16777217, 5])
    texts = []
    for library in (json_tensors.orjson, None):
        monkeypatch.setattr(json_tensors, "orjson", library)
        texts.append(json_tensors.encoded({"data": json_tensors.data_of(array)}))
        with pytest.raises(ValueError, match="NaN or infinity"):
            json_tensors.data_of(np.float32([np.inf]))
    assert all(np.float32(json.loads(text)["data"]).tobytes() == array.tobytes() for text in texts)
    assert all(text.startswith(b'{"data":[0.1,1e-') for text in texts)
