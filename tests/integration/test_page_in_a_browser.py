"""The page in headless Chromium: it stays live, acts after a confirmation only, and everybody can use it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Route, expect, sync_playwright
from tests.support import requirements
from tests.support.brokers import Mosquitto, mosquitto
from tests.support.controllers import ControllerProcess
from tests.support.pages import fleet, releases
from tests.support.ports import free_port
from tests.support.scripted_agent import ScriptedAgent, failed, serving
from tests.support.waiting import wait_for

from kedge.fleet import samples, shadows
from kedge.fleet.service import FleetService
from kedge.fleet.staged import records
from kedge.fleet.staged.gates import GateResult, Verdict
from kedge.fleet.staged.policy import Policy
from kedge_protocol.bundle.layout import Layout
from kedge_protocol.samples import Choice

__all__ = ["fleet", "mosquitto", "releases"]

pytestmark = pytest.mark.needs("chromium", "mosquitto")

PAGES = (
    "/", "/devices", "/devices/pi", "/rollouts", "/rollouts/2", "/rollouts/3", "/releases", "/inputs",
    "/inputs/samples/1",
)  # fmt: skip
RESULTS = [
    GateResult(
        gate=gate, target=f"a-target-of-a-long-name-{verdict.value}", verdict=verdict, figure=figure, limit=limit,
        low=None if figure is None else figure / 2, high=None if figure is None else figure * 2, samples=1234,
        detail="7.00% of 1234 calls failed, 1.00% before, dispersion 1.3",
    )
    for gate, limit in (("error_rate", 0.02), ("p99_ratio", 1.25), ("memory_per_minute", 5e5), ("agreement", 0.95))
    for verdict, figure in ((Verdict.FAIL, 0.9 * limit), (Verdict.PASS, 1.1 * limit), (Verdict.UNDECIDED, None))
]  # fmt: skip
HOSTILE = "golden vector 3 differs <img src=x onerror=document.body.remove()>"
"""What a device says is text on the page, whatever it says."""
WIDTHS = {"phone": 390, "desk": 1280}
UNDER_A_NAME = """[...document.querySelectorAll(".stack td[data-name] *")].filter((one) => {
    const cell = one.closest("td").getBoundingClientRect();
    return one.getClientRects().length && one.getBoundingClientRect().left - cell.left < 90;
}).map((one) => one.outerHTML)"""
"""What a phone's page shows where the names of a table's columns stand, in place of beside them."""
PATIENCE = 120_000
"""Milliseconds: they bound a fault and measure nothing."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        path = requirements.program("chromium")
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def url(fleet: FleetService, mosquitto: Mosquitto) -> Iterator[str]:
    """The page of a running controller."""
    address = f"127.0.0.1:{free_port()}"
    with ControllerProcess(fleet.state, "--broker", mosquitto.url, "--page", address) as controller:
        controller.start()
        yield f"http://{address}"


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    """A tab that fails the test if a script fails or the policy forbids something."""
    context = browser.new_context(base_url=url, viewport={"width": WIDTHS["desk"], "height": 900})
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text) if "Content Security" in message.text else None)
    yield tab
    context.close()
    assert wrong == []


def digest_of(releases: dict[str, Path], version: str) -> str:
    return Layout(releases[version]).bundle("rpi4").digest


def test_a_rollout_is_started_fails_and_is_taken_back_before_the_readers_eyes(
    page: Page, fleet: FleetService, releases: dict[str, Path], mosquitto: Mosquitto
) -> None:
    old, new = digest_of(releases, "1.0"), digest_of(releases, "2.0")
    fleet.device_remove("pc")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(0)
        page.goto("/releases")
        page.get_by_role("region", name="tiny:1.0").get_by_role("button", name="Roll out").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Rollout 1: tiny:1.0")
        page.evaluate("window.untouched = true")
        agent.report(1, {"tiny": serving(old)})
        expect(page.locator("#state")).to_have_text("done")
        assert page.evaluate("window.untouched"), "the page was loaded again"

        page.goto("/releases")
        page.get_by_role("region", name="tiny:2.0").get_by_role("button", name="Roll out").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Rollout 2: tiny:2.0")
        agent.report(2, {"tiny": failed(new, HOSTILE, still=old)})
        expect(page.get_by_role("row", name="pi rpi4")).to_contain_text(HOSTILE)

        revert = page.get_by_role("button", name="Revert")
        revert.click()
        page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
        assert len(fleet.rollouts()) == 2
        revert.click()
        page.get_by_role("dialog").get_by_role("button", name="Revert").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Rollout 3: tiny:1.0")
        agent.report(3, {"tiny": serving(old)})
        expect(page.locator("#state")).to_have_text("done")
        page.goto("/devices/pi")
        expect(page.get_by_role("article")).to_contain_text("because rollout 3 (revert of 1.0) asked for it")


def test_a_rollout_in_waves_fails_a_gate_and_is_seen_to_roll_back(
    page: Page, fleet: FleetService, releases: dict[str, Path], mosquitto: Mosquitto
) -> None:
    old, new = digest_of(releases, "1.0"), digest_of(releases, "2.0")
    fleet.device_remove("pc")
    fleet.rollout_start("tiny:1.0")
    with ScriptedAgent("pi", mosquitto.port) as agent:
        agent.birth()
        agent.report(1, {"tiny": serving(old)})
        page.goto("/releases")
        region = page.get_by_role("region", name="tiny:2.0")
        region.get_by_label("Policy").fill('waves = ["100%"]\nsoak = "10m"')
        region.get_by_role("button", name="Roll out").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll out").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Rollout 2: tiny:2.0")
        expect(page.locator("#phase")).to_have_text("running")

        page.get_by_role("button", name="Pause").click()
        page.get_by_role("dialog").get_by_role("button", name="Pause").click()
        expect(page.locator("#phase")).to_have_text("running, paused")
        page.get_by_role("button", name="Resume").click()
        page.get_by_role("dialog").get_by_role("button", name="Resume").click()
        expect(page.locator("#phase")).to_have_text("running")

        page.evaluate("window.untouched = true")
        agent.report(2, {"tiny": failed(new, HOSTILE, still=old)})
        expect(page.locator("#phase")).to_have_text("reverting")
        gate = page.get_by_role("group").filter(has_text="Golden vectors")
        expect(gate.get_by_role("img", name="rpi4: 100 %")).to_be_visible()
        expect(gate).to_contain_text("1 of 1 devices refused it by their golden vectors")
        expect(page.get_by_role("region", name="Waves")).to_contain_text("Taken back by rollout 3")
        agent.report(3, {"tiny": serving(old)})
        expect(page.locator("#phase")).to_have_text("aborted")
        expect(page.get_by_role("region", name="Waves").get_by_role("row", name="1 (now)")).to_contain_text(
            "1 reverted"
        )
        expect(page.get_by_role("region", name="What happened")).to_contain_text("rollout.abort")
        assert page.evaluate("window.untouched"), "the page was loaded again"


def test_samples_are_asked_for_and_cancelled(page: Page, fleet: FleetService) -> None:
    fleet.rollout_start("tiny:1.0")
    page.goto("/inputs")
    page.get_by_label("Which").select_option("low-confidence")
    page.get_by_label("Count").fill("7")
    page.get_by_role("button", name="Ask for samples").click()
    page.get_by_role("dialog").get_by_role("button", name="Ask for samples").click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Samples 1: tiny")
    expect(page.get_by_role("row", name="pi")).to_contain_text("asked")
    page.get_by_role("button", name="Cancel").first.click()
    page.get_by_role("dialog").get_by_text("What came home stays").wait_for()
    page.locator("#ask-yes").click()
    expect(page.locator("#state")).to_have_text("cancelled")
    expect(page.get_by_role("row", name="pi")).to_contain_text("cancelled")
    assert [part.state for part in samples.show(fleet, 1)[0].parts] == ["cancelled", "cancelled"]


def test_what_cannot_be_done_is_told_where_it_was_asked(page: Page, fleet: FleetService) -> None:
    page.goto("/releases")
    region = page.get_by_role("region", name="tiny:1.0")
    region.get_by_label("Labels").fill("site=paris")
    region.get_by_role("button", name="Roll out").click()
    page.get_by_role("dialog").get_by_role("button", name="Roll out").click()
    expect(page.get_by_role("status")).to_contain_text("site=paris")
    assert fleet.rollouts() == ()


def test_all_is_reached_by_keyboard(page: Page, fleet: FleetService) -> None:
    fleet.rollout_start("tiny:1.0")
    page.goto("/rollouts/1")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Revert")).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("button", name="Cancel")).to_be_focused()
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    assert len(fleet.rollouts()) == 1
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1)).to_contain_text("Rollout 2")


def test_a_question_is_not_answered_by_the_end_of_the_one_before(page: Page, fleet: FleetService) -> None:
    """The dialog's close event is queued, so that on a busy machine it comes after the next question was asked."""
    fleet.rollout_start("tiny:1.0")
    page.goto("/rollouts/1")
    page.evaluate("""
        document.getElementById("ask").addEventListener("close", (event) => {
            if (!window.late) { window.late = true; event.stopImmediatePropagation(); }
        }, true)
    """)
    revert = page.get_by_role("button", name="Revert…")
    dialog = page.get_by_role("dialog")
    revert.click()
    dialog.get_by_role("button", name="Cancel").click()
    page.wait_for_function("window.late")
    revert.click()
    page.evaluate("document.getElementById('ask').dispatchEvent(new Event('close'))")
    assert len(fleet.rollouts()) == 1
    dialog.get_by_role("button", name="Revert").click()
    expect(page.get_by_role("heading", level=1)).to_contain_text("Rollout 2")
    assert len(fleet.rollouts()) == 2


def test_what_is_being_typed_stays_while_the_page_changes(page: Page, fleet: FleetService) -> None:
    page.goto("/devices")
    field = page.get_by_label("Name or label")
    field.fill("half a wo")
    fleet.device_add("newcomer", "rpi4")
    expect(page.get_by_role("row", name="newcomer")).to_be_visible()
    expect(field).to_have_value("half a wo")
    expect(field).to_be_focused()


def test_what_changed_while_a_page_was_on_its_way_is_shown(page: Page, url: str, fleet: FleetService) -> None:
    def seen() -> str:
        with urllib.request.urlopen(f"{url}/devices", timeout=60) as answer:
            return answer.read().decode().partition('data-seen="')[2].partition('"')[0]

    def late(route: Route) -> None:
        before = seen()
        fleet.device_add("newcomer", "rpi4")
        wait_for(lambda: seen() != before, what="a change that the server has seen")
        route.continue_()

    page.route("**/events", late)
    page.goto("/devices")
    expect(page.get_by_role("row", name="newcomer")).to_be_visible()


def test_without_the_controller_the_page_says_so(browser: Browser, fleet: FleetService, mosquitto: Mosquitto) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ControllerProcess(fleet.state, "--broker", mosquitto.url, "--page", address) as controller:
        controller.start()
        tab = browser.new_page()
        tab.set_default_timeout(PATIENCE)
        tab.goto(f"http://{address}/")
        expect(tab.locator("#live")).to_have_text("live")
        controller.kill()
        expect(tab.locator("#live")).to_have_text("connection lost")
        tab.close()


@pytest.mark.parametrize(("width", "scheme"), [(WIDTHS["phone"], "light"), (WIDTHS["desk"], "dark")])
@pytest.mark.packages("axe_playwright_python")
def test_axe_finds_nothing_and_no_page_is_wider_than_the_screen(
    browser: Browser, url: str, fleet: FleetService, width: int, scheme: str
) -> None:
    import axe_playwright_python

    axe = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text(encoding="utf-8")
    fleet.rollout_start("tiny:1.0")
    fleet.rollout_start("tiny:2.0", {"site": "berlin"})
    fleet.rollout_start("tiny:1.0", policy=Policy(soak=3600.0))
    shadows.start(fleet, "tiny:2.0", {})
    samples.request(fleet, "tiny", Choice.LOW_CONFIDENCE, 5)
    wait_for(lambda: fleet.rollout_status(3).stage.wave == 1, what="a first wave")  # type: ignore[union-attr]
    with fleet.database.write() as session:
        records.keep_gates(session, 3, 1, RESULTS, session.now())
    # axe is put into the page by its text, which the page's own policy forbids.
    context = browser.new_context(
        base_url=url, viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True
    )
    tab = context.new_page()
    tab.set_default_timeout(PATIENCE)
    for path in PAGES:
        tab.goto(path)
        tab.evaluate(axe)
        found = tab.evaluate("axe.run()")
        assert [(one["id"], one["nodes"][0]["html"]) for one in found["violations"]] == [], path
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, path
        if width == WIDTHS["phone"]:
            assert tab.evaluate(UNDER_A_NAME) == [], path
    context.close()
