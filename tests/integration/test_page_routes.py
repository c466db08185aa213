"""The controller's page over HTTP: who is let in, the JSON routes, and the figures for Prometheus."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.test_serving_metrics import value
from tests.support import requirements
from tests.support.bundles import make_bundle
from tests.support.controllers import ControllerProcess
from tests.support.pages import Page, fleet, page, releases
from tests.support.ports import free_port
from tests.support.waiting import wait_for

from kedge.fleet import drift, shadows
from kedge.fleet.service import FleetService
from kedge.fleet.staged.engine import Engine
from kedge.fleet.staged.policy import Policy
from kedge.page.options import PageAddress, PageOptions
from kedge.page.server import serving
from kedge_protocol.drift import Kind, Statistic, Stream
from kedge_protocol.errors import ConfigError
from kedge_protocol.messages import ModelTelemetry, Telemetry

__all__ = ["fleet", "page", "releases"]

pytestmark = pytest.mark.packages("fastapi")
TOKEN = "0123456789abcdef"


def test_the_verbs_work_as_json(page: Page, fleet: FleetService) -> None:
    assert page.json("GET", "/fleet")["health"] == {"unheard": 2}
    assert [one["name"] for one in page.json("GET", "/devices?target=rpi4")["devices"]] == ["pi"]
    assert page.json("POST", "/devices", {"name": "new", "target": "rpi5"}, 201)["target"] == "rpi5"
    assert page.json("PATCH", "/devices/new", {"labels": {"site": "paris"}})["labels"] == {"site": "paris"}
    page.json("DELETE", "/devices/new", status=204)
    started = page.json("POST", "/rollouts", {"release": "tiny:1.0", "select": {"site": "berlin"}}, 201)
    assert started["rollout"]["counts"] == {"offline": 1}
    page.json("POST", "/rollouts", {"release": "tiny:2.0"}, 201)
    assert page.json("GET", "/rollouts/1")["state"] == "superseded"
    assert page.json("POST", "/rollouts/2/revert")["version"] == "1.0"
    assert [one["rollout"] for one in page.json("GET", "/devices/pi/history")] == [3, 2, 1]
    assert fleet.rollout_status().kind == "revert"


def test_a_staged_rollout_is_steered_by_routes_and_shown(page: Page, fleet: FleetService) -> None:
    wish = {"release": "tiny:1.0", "policy": {"waves": ["1", "100%"], "min_per_target": 0, "soak": "1h"}}
    fleet.device_add("pi2", "rpi4")
    plan = page.json("POST", "/rollout-plans", wish)
    assert [sum(map(len, wave["devices"].values())) for wave in plan["waves"]] == [2, 1]
    assert fleet.rollouts() == ()
    begun = page.json("POST", "/rollouts", wish, 201)["rollout"]["stage"]
    assert (begun["planned"], begun["policy"]["soak"]) == (2, 3600.0)
    Engine(fleet.database).tick(now=fleet.database.clock())
    assert page.json("POST", "/rollouts/1/pause")["stage"]["paused"] is True
    assert page.json("POST", "/rollouts/1/pause", status=409)["what"] == "rollout 1: it is paused already"
    assert page.json("POST", "/rollouts/1/resume")["stage"]["paused"] is False
    assert page.json("POST", "/rollouts/1/promote")["stage"]["wave"] == 2
    assert "none of its devices" in page.json("POST", "/rollouts/1/retry", {}, 409)["what"]
    shown = page.ask("GET", "/rollouts/1", headers={"Accept": "text/html"})[2].decode()
    assert all(f'data-to="/api/v1/rollouts/1/{verb}"' in shown for verb in ("pause", "abort"))
    assert page.json("POST", "/rollouts/1/abort", {"reason": "a test"})["state"] == "aborted"
    shown = page.ask("GET", "/rollouts/1", headers={"Accept": "text/html"})[2].decode()
    assert 'data-to="/api/v1/rollouts/1/' not in shown
    assert "page:local: a test" in shown
    entries = fleet.audit_log(subject="rollout 1")
    assert {entry.actor for entry in entries if entry.action == "rollout.pause"} == {"page:local"}
    for verb in ("pause", "resume", "promote"):
        page.json("POST", f"/rollouts/99/{verb}", status=404)


def test_a_rollout_shows_which_of_several_bundles_its_devices_have(
    page: Page, fleet: FleetService, tmp_path: Path
) -> None:
    fleet.publish(make_bundle(tmp_path, version="7.0", target="rpi4", also={"openvino": None}))
    fleet.rollout_start("tiny:7.0")
    (choice,) = page.json("GET", "/rollouts/1")["choices"]
    assert [one["backend"] for one in choice["backends"]] == ["onnxruntime", "openvino"]
    assert (choice["measuring"], choice["waiting"]) == (1, 0)
    shown = page.ask("GET", "/rollouts/1", headers={"Accept": "text/html"})[2].decode()
    assert "Several bundles of a target" in shown
    assert "1 measure two, 0 wait for their figures" in shown


def test_a_policy_that_does_not_fit_is_told_and_starts_nothing(page: Page, fleet: FleetService) -> None:
    for policy in (
        {"policy": {"wave": ["1%"]}},
        {"policy": {"gates": {"error_rate": 7}}},
        {"policy_toml": "waves = ["},
    ):
        told = page.json("POST", "/rollouts", {"release": "tiny:1.0", **policy}, 409)
        assert told["error"] == "ConfigError", told
    both = {"release": "tiny:1.0", "policy": {}, "policy_toml": "soak = 5"}
    assert page.json("POST", "/rollouts", both, 409)["what"] == "there are two policies"
    assert fleet.rollouts() == ()


def test_a_change_by_a_route_stands_in_the_audit_log_under_the_pages_client(page: Page, fleet: FleetService) -> None:
    page.json("POST", "/devices", {"name": "audited", "target": "rpi4"}, 201)
    assert [(one.actor, one.action) for one in fleet.audit_log(subject="audited")] == [("page:local", "device.add")]


def test_what_cannot_be_done_is_told_with_a_remedy(page: Page) -> None:
    assert page.json("GET", "/devices/none", status=404)["remedy"].startswith("Known are: pc, pi")
    assert page.json("POST", "/rollouts", {"release": "tiny:9"}, 404)["remedy"] == "Published are: tiny:1.0, tiny:2.0"
    assert page.json("POST", "/rollouts", {"release": "tiny:1.0", "selct": {}}, 422)["where"] == "body.selct"
    assert page.json("POST", "/devices", {"name": "pi", "target": "rpi4"}, 409)["error"] == "FleetError"
    assert page.json("POST", "/devices", {"name": "a", "target": "none"}, 404)["error"] == "TargetError"
    page.json("POST", "/rollouts", {"release": "tiny:1.0"}, 201)
    assert "cannot be removed" in page.json("DELETE", "/releases/tiny/1.0", status=409)["what"]
    for path in ("/rollouts/99", "/rollouts/99/revert"):
        page.json("POST" if path.endswith("revert") else "GET", path, status=404)
    assert page.ask("GET", f"/api/v1/rollouts/{10**30}")[0] == 422


def test_a_foreign_name_for_this_host_is_refused(page: Page) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[::", "10.0.0.1"):
        assert page.ask("GET", "/api/v1/fleet", headers={"Host": host})[0] in {400, 421}, host
    for host in ("localhost", "localhost:8090", "127.0.0.1", "[::1]:8090", "LOCALHOST"):
        assert page.ask("GET", "/api/v1/fleet", headers={"Host": host})[0] == 200, host


def test_another_site_changes_nothing(page: Page, fleet: FleetService) -> None:
    wish = {"release": "tiny:1.0"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert page.ask("POST", "/api/v1/rollouts", wish, headers)[0] == 403, headers
    assert page.ask("POST", "/api/v1/rollouts", wish, {"Content-Type": "text/plain"})[0] == 422
    assert fleet.rollouts() == ()
    own = {"Origin": page.url, "Sec-Fetch-Site": "same-origin"}
    assert page.ask("POST", "/api/v1/rollouts", wish, own)[0] == 201


def test_a_large_body_is_refused_before_it_is_read(page: Page) -> None:
    assert page.ask("POST", "/api/v1/rollouts", b" " * 70_000)[0] == 413
    assert page.ask("POST", "/api/v1/rollouts", b"", {"Transfer-Encoding": "chunked"})[0] == 413


def test_every_answer_forbids_what_the_page_does_not_need(page: Page) -> None:
    for path in ("/", "/devices", "/rollouts", "/releases", "/static/page.js", "/api/v1/fleet", "/nothing"):
        _, headers, body = page.ask("GET", path, headers={"Accept": "text/html"})
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; "), path
        assert "unsafe" not in policy, path
        assert headers["x-content-type-options"] == "nosniff"
        assert b"https://" not in body, path


def test_a_compile_report_may_draw_and_run_nothing(page: Page) -> None:
    status, headers, body = page.ask("GET", "/releases/tiny/2.0/report")
    assert (status, body[:19]) == (200, b"<title>made</title>")
    policy = headers["content-security-policy"]
    assert policy.endswith("; sandbox")
    assert "script-src" not in policy
    assert page.ask("GET", "/releases/tiny/1.0/report")[0] == 404


def test_drift_and_shadows_of_a_device_are_shown(page: Page, fleet: FleetService) -> None:
    fleet.rollout_start("tiny:1.0")
    shadows.start(fleet, "tiny:2.0", {"site": "berlin"})
    stream = Stream(kind=Kind.INPUT, tensor="x", statistic=Statistic.MEAN, edges=(0.0,), counts=(100, 100))
    with fleet.database.write() as session:
        digest = session.value(
            "SELECT digest FROM desired_model JOIN device ON device.id = device_id WHERE name = 'pi'"
        )
        number = session.value("SELECT id FROM device WHERE name = 'pi'")
        session.run("UPDATE bundle SET drift = ? WHERE digest = ?", (drift.document((stream,)), digest))
        counts: dict[str, tuple[int, ...]] = {
            stream.name: (0, 20),
            "input/unknown/mean": (1, 1),
            "input/x/spread": (-5, 1),
        }
        model = ModelTelemetry(
            digest=digest, inferences=20, errors=0, inferences_total=20, errors_total=0, drift=counts
        )
        message = Telemetry(
            boot_id="b", seq=1, interval=5.0, models={"tiny": model}, cpu_percent=0.0, memory_total_bytes=1,
            memory_available_bytes=1, agent_bytes=1, free_bytes=1)  # fmt: skip
        now = session.now()
        # What came long ago hides nothing: it is of a window before the last.
        before = replace(message, models={"tiny": replace(model, drift={stream.name: (10**6, 0)})})
        drift.note(session, number, [(now - 3 * drift.WINDOW_SECONDS, before), (now - 1, message), (now, message)])
    (cohort,) = drift.cohorts(fleet.database, by=("site",))
    assert (cohort.name, cohort.devices, [shift.samples for shift in cohort.alarms]) == ("site=berlin", 1, [40])
    body = page.ask("GET", "/devices/pi")[2].decode()
    assert "input/x/mean" in body
    assert "drifts" in body
    assert "is wanted; the device has not reported it" in body
    assert "input/x/mean" not in page.ask("GET", "/devices/pc")[2].decode()


def test_what_devices_and_people_wrote_is_text_on_the_page(page: Page, fleet: FleetService) -> None:
    status, _, body = page.ask("GET", "/devices?text=%3Cscript%3Ex&health=nonsense&target=%22%3E%3Cb%3E")
    assert status == 200
    assert b"<script>x" not in body
    assert b"<b>" not in body


def test_with_tokens_nobody_comes_in_without_one(fleet: FleetService) -> None:
    with serving(fleet.state, PageAddress(host="127.0.0.1", port=0, tokens={"anna": TOKEN})) as url:
        page = Page(url)
        for path in ("/api/v1/fleet", "/metrics", "/events", "/", "/rollouts/1", "/releases/tiny/2.0/report"):
            assert page.ask("GET", path)[0] == 401, path
            status, _, said = page.ask("GET", path, headers={"Authorization": "Bearer wrong"})
            assert (status, b"this token is none of the controller's" in said) == (401, True), path
            assert page.ask("GET", path, headers={"Cookie": "kedge_page=anna.9999999999.00"})[0] == 401, path
        status, headers, _ = page.ask("GET", "/", headers={"Accept": "text/html"})
        assert (status, headers["location"]) == (303, "/login")
        assert page.ask("GET", "/metrics", headers={"Authorization": f"Bearer {TOKEN}"})[0] == 200
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert page.ask("POST", "/login", "token=wrong", form)[0] == 403
        status, headers, _ = page.ask("POST", "/login", f"token={TOKEN}", form)
        cookie = headers["set-cookie"]
        assert status == 303
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert TOKEN not in cookie
        status, _, body = page.ask("GET", "/", headers={"Cookie": cookie.partition(";")[0]})
        assert status == 200
        assert b"anna" in body


@pytest.mark.needs("openssl")
def test_a_page_with_a_certificate_speaks_tls(fleet: FleetService, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    made = [requirements.program("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    subprocess.run([*made, "-nodes", "-keyout", str(key), "-out", str(cert), *subject], check=True, capture_output=True)
    address = PageAddress(host="127.0.0.1", port=0, tokens={"anna": TOKEN}, cert=cert, key=key)
    with serving(fleet.state, address) as url:
        assert url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=str(cert))
        connection = http.client.HTTPSConnection("localhost", int(url.rpartition(":")[2].rstrip("/")), context=trusting)
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/login", f"token={TOKEN}", form)
        answer = connection.getresponse()
        assert answer.status == 303
        assert "Secure" in (answer.headers["Set-Cookie"] or "")
        connection.close()


def test_an_address_that_is_taken_is_told(fleet: FleetService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = PageOptions(page=f"127.0.0.1:{other.getsockname()[1]}").parsed()
        assert address is not None
        with pytest.raises(ConfigError, match="cannot listen"), serving(fleet.state, address):
            pass


def test_open_pages_hear_of_a_change_in_another_process(page: Page, fleet: FleetService) -> None:
    host, _, port = page.netloc.partition(":")
    with socket.create_connection((host, int(port)), timeout=60) as stream:
        stream.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        heard = b""
        while heard.count(b"event: changed") < 1:
            heard += stream.recv(4096)
        fleet.device_edit("pi", {"floor": "2"})
        while heard.count(b"event: changed") < 2:
            heard += stream.recv(4096)
    assert b"text/event-stream" in heard


def test_the_audit_log_is_read_and_verified_by_routes(page: Page, fleet: FleetService) -> None:
    fleet.rollout_start("tiny:1.0")
    found = page.json("GET", "/audit?subject=rollout%201")
    assert [(one["action"], one["subject"]) for one in found] == [("rollout.start", "rollout 1")]
    head = page.json("GET", "/audit/head")["head"]
    assert head == page.json("GET", "/audit?limit=1")[0]["hash"]
    assert page.json("GET", f"/audit/head?expect={head[:8]}") == {"head": head}
    assert "does not hold" in page.json("GET", f"/audit/head?expect={'0' * 12}", status=409)["what"]
    with fleet.database.write() as session:
        session.run("DROP TRIGGER audit_is_not_changed")
        session.run("UPDATE audit SET actor = 'nobody' WHERE id = 1")
    assert "broken at entry 1" in page.json("GET", "/audit/head", status=409)["what"]


def test_samples_are_asked_for_and_cancelled_and_shadows_begin_and_end_by_routes(
    page: Page, fleet: FleetService
) -> None:
    asked = {"model": "tiny", "where": "low-confidence", "count": 7, "seconds": 60.0}
    assert "no device can be asked" in page.json("POST", "/samples", asked, 409)["what"]
    fleet.rollout_start("tiny:1.0")
    begun = page.json("POST", "/samples", asked, 201)
    assert (begun["id"], begun["state"], begun["count"], len(begun["parts"])) == (1, "open", 7, 2)
    assert page.json("GET", "/samples")[0]["parts"][0]["state"] == "asked"
    assert page.json("POST", "/samples/1/cancel")["state"] == "cancelled"
    assert page.json("GET", "/samples/2", status=404)["what"] == "there is no request 2 for samples"
    assert page.json("GET", "/drift") == []
    assert "another bundle" in page.json("POST", "/shadows", {"release": "tiny:1.0"}, 409)["what"]
    told = page.json("POST", "/shadows", {"release": "tiny:2.0", "share": 0.2}, 201)
    assert [one["device"] for one in page.json("GET", "/shadows")] == told
    shown = page.ask("GET", "/inputs")[2].decode()
    assert shown.count("low-confidence") == 2  # of the request, and to be chosen for the next
    assert "2 cancelled" in shown
    assert shown.count("1 pending") == 2  # shadows that no device has reported yet
    assert "cancelled" in page.ask("GET", "/inputs/samples/1")[2].decode()
    assert page.ask("GET", "/inputs/samples/2")[0] == 404
    assert page.json("POST", "/shadows/stop", {"model": "tiny"}) == told
    assert page.json("GET", "/shadows?model=tiny") == []
    assert {one.actor for one in fleet.audit_log() if one.action.startswith(("samples", "shadow"))} == {"page:local"}


def reads(port: int, query: str, number: float) -> None:
    """Wait until Prometheus answers a query with this number."""
    wait_for(lambda: value(port, query) == number, what=query)


@pytest.mark.needs("prometheus", "promtool")
def test_prometheus_reads_the_fleets_figures(fleet: FleetService, tmp_path: Path) -> None:
    fleet.rollout_start("tiny:1.0")
    port, broker, at = free_port(), free_port(), free_port()
    options = ("--embedded", "--listen", f"127.0.0.1:{broker}", "--page", f"127.0.0.1:{port}")
    with ControllerProcess(fleet.state, *options) as controller:
        controller.start()
        metrics = Page(f"http://127.0.0.1:{port}").ask("GET", "/metrics")[2]
        checked = subprocess.run(
            [requirements.program("promtool"), "check", "metrics"], input=metrics, capture_output=True, timeout=300
        )
        assert checked.returncode == 0, checked.stderr.decode()
        config = tmp_path / "prometheus.yml"
        config.write_text(
            "scrape_configs: [{job_name: kedge, scrape_interval: 1s, scrape_timeout: 1s, "
            f'static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]\n'
        )
        command = [
            requirements.program("prometheus"),
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path}/tsdb",
        ]
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{at}"], stderr=subprocess.DEVNULL)
        try:
            # Each by itself: a scrape that comes late on a busy machine empties all.
            reads(at, "kedge_controller_connected", 1)
            reads(at, 'sum(kedge_devices{target="rpi4"})', 1)
            reads(at, 'kedge_rollout_devices{rollout="1",progress="offline"}', 2)
            reads(at, "process_resident_memory_bytes > bool 0", 1)
            # A rollout in waves, with what its gates say: nobody answers yet.
            fleet.rollout_start("tiny:1.0", policy=Policy(waves=("100%",)))
            reads(at, 'kedge_rollout_gate{rollout="2",gate="silence",target="rpi4"}', 0)
            reads(at, 'kedge_rollout_gate_limit{rollout="2",gate="silence",target="rpi4"}', 0.1)
            reads(at, 'kedge_rollout_phase{rollout="2",phase="running"}', 1)
            fleet.rollout_abort(2, reason="a test")
            reads(at, 'sum(kedge_rollout_phase{rollout="2",phase=~"abort.*|revert.*"})', 1)
        finally:
            process.terminate()
            process.wait(60)
        assert controller.terminate() == 0


def test_a_page_beyond_loopback_is_refused_before_the_controller_starts(fleet: FleetService) -> None:
    with ControllerProcess(fleet.state, "--embedded", "--page", "0.0.0.0:8090") as controller:
        controller.start(connected=False)
        assert controller.wait() != 0
        assert "needs a token and TLS" in controller.text()


def test_a_page_of_two_thousand_devices_stays_small(page: Page, fleet: FleetService) -> None:
    rows = [(f"many-{number:04}", "rpi4", '{"site": "berlin"}') for number in range(2000)]
    with fleet.database.write() as session:
        session.run_many(
            "INSERT INTO device (name, target, labels, added_at, desired_version, managed, removed)"
            " VALUES (?, ?, ?, 0, 0, 0, 0)",
            rows,
        )
    fleet.rollout_start("tiny:1.0")
    for path in ("/", "/devices", "/rollouts/1"):
        status, _, body = page.ask("GET", path)
        assert status == 200
        assert len(body) < 150_000, path
    assert json.loads(page.ask("GET", "/api/v1/devices?limit=1")[2])["total"] == 2002
