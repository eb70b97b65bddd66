"""A person's way through Airflow in a real browser: log in, fill the form, watch the grid turn green, read the report.

Pictures of each step are left in build/screenshots.
"""

import re

import pytest

from tests.support.airflow.standalone import ADMIN, OTHER_REPO, PASSWORDS, ROOT, RUN_SECONDS
from tests.support.browser import browser, watched_page  # noqa: F401 - a fixture

pytestmark = pytest.mark.timeout(1200)

PICTURES = ROOT / "build" / "screenshots"
SHOWN_SECONDS = 60
TARGET = "unscanned-bf16-ocdbt-zarr3-maxtext0.2.5"
STAGES = ("resolve", "download", "dequantize", "finalize", "check", "publish", "clean_up")


def picture(page, name):
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def log_in(page, address):
    page.goto(address)
    page.get_by_label("Username").fill(ADMIN)
    page.locator("input[type=password]").fill(PASSWORDS[ADMIN])
    page.get_by_role("button", name="Sign in").click()
    page.get_by_test_id("trigger-dag-button").wait_for()


def fill_form(page, repo):
    """Opens the form of `onboard_checkpoint`; asks for `repo`, unscanned."""
    page.get_by_test_id("trigger-dag-button").click()
    form = page.get_by_role("dialog")
    form.get_by_role("button", name="Source").click()
    submit = form.get_by_test_id("trigger-dag-submit")
    assert submit.is_disabled()  # a repository is wanted
    form.locator("[name=element_repo]").fill(repo)
    picture(page, "1-form-source")
    form.get_by_role("button", name="What to write").click()
    form.get_by_text("Scanned layers").wait_for()
    form.locator("label").filter(has=page.locator("[name=element_scan_layers]")).click()
    picture(page, "2-form-target")
    return submit


def test_form_refuses_what_the_schema_does_not_take(page, standalone):
    """With the reason, and without starting a run."""
    page.goto(f"{standalone.endpoint}/dags/onboard_checkpoint")
    fill_form(page, "no-slash").click()
    refusal = page.get_by_role("dialog").get_by_text("Invalid input for param repo")
    refusal.wait_for()
    refusal.evaluate("element => element.scrollIntoView({block: 'start'})")
    picture(page, "0-form-refused")
    runs = standalone.api("GET", "/dags/onboard_checkpoint/dagRuns?limit=100")["dag_runs"]
    assert not [run for run in runs if run["conf"].get("repo") == "no-slash"]


def is_green(cell):
    """Whether the cell of the grid is, to the eye."""
    colour = cell.evaluate("element => getComputedStyle(element).backgroundColor")
    red, green, blue = (int(part) for part in re.findall(r"\d+", colour)[:3])
    return green > 2 * max(red, blue)


@pytest.fixture(scope="module")
def page(browser, standalone):  # noqa: F811
    with watched_page(browser, width=1440, height=1000) as (page, seen):
        page.set_default_timeout(SHOWN_SECONDS * 1000)
        log_in(page, f"{standalone.endpoint}/dags/onboard_checkpoint")
        seen.errors.clear()  # Airflow's own page asks who is there before anybody has logged in
        page.seen = seen
        yield page


@pytest.fixture(scope="module")
def onboarded(page, standalone):
    """The id of the run that the form started, when it has ended."""
    page.goto(f"{standalone.endpoint}/dags/onboard_checkpoint")
    fill_form(page, OTHER_REPO).click()

    def started():
        runs = standalone.api("GET", "/dags/onboard_checkpoint/dagRuns?limit=100")["dag_runs"]
        return next((run["dag_run_id"] for run in runs if run["conf"].get("repo") == OTHER_REPO), None)

    run_id = standalone.wait_until(started, SHOWN_SECONDS, "run of what the form said")
    page.goto(f"{standalone.endpoint}/dags/onboard_checkpoint/runs/{run_id}")
    page.get_by_test_id(f"grid-{run_id}-resolve").wait_for()
    picture(page, "3-grid-running")
    assert standalone.wait_for_run("onboard_checkpoint", run_id, seconds=RUN_SECONDS) == "success"
    return run_id


def test_grid_turns_green(page, standalone, onboarded):
    cells = [page.get_by_test_id(f"grid-{onboarded}-{stage}").get_by_test_id("task-state-badge") for stage in STAGES]
    standalone.wait_until(lambda: all(is_green(cell) for cell in cells), SHOWN_SECONDS, "green grid")
    picture(page, "4-grid-green")


def test_button_of_a_task_leads_to_the_tab_of_the_run(page, standalone, onboarded):
    page.goto(f"{standalone.endpoint}/dags/onboard_checkpoint/runs/{onboarded}/tasks/check/details")
    page.get_by_role("link", name="Output").click()
    page.frame_locator("iframe[title=Ferry]").get_by_text("logits: pass").wait_for()


def test_tab_of_the_run_shows_stages_and_report(page, standalone, onboarded):
    page.goto(f"{standalone.endpoint}/dags/onboard_checkpoint/runs/{onboarded}")
    page.get_by_role("link", name="Ferry").click()
    tab = page.frame_locator("iframe[title=Ferry]")
    tab.get_by_text("logits: pass").wait_for()
    assert tab.locator("dd").all_inner_texts()[1] == TARGET
    report = tab.frame_locator("iframe[title='Logit report']")
    report.get_by_role("heading", name="KL divergence for each token").wait_for()
    assert report.locator(".verdict strong").inner_text().lower() == "pass"
    picture(page, "5-tab")
    tab.get_by_role("heading", name="Logit report").scroll_into_view_if_needed()
    report.locator(".verdict").scroll_into_view_if_needed()
    picture(page, "6-report")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_of_all_models_reads_in_light_and_dark(page, standalone, onboarded, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{standalone.endpoint}/plugin/ferry_models")
    models = page.frame_locator("iframe[title=Models]")
    models.get_by_role("row").filter(has_text=TARGET).filter(has_text=OTHER_REPO).wait_for()
    colours = models.locator("body").evaluate(
        "body => [getComputedStyle(body).color, getComputedStyle(body).backgroundColor]"
    )
    ink, ground = (sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in colours)
    assert abs(ink - ground) > 450
    assert (ink > ground) == (scheme == "dark")
    picture(page, f"7-models-{scheme}")


def test_link_to_the_onboarding_stays_inside(page, standalone, onboarded):
    page.goto(f"{standalone.endpoint}/plugin/ferry_models")
    models = page.frame_locator("iframe[title=Models]")
    row = models.get_by_role("row").filter(has_text=TARGET).filter(has_text=OTHER_REPO)
    row.get_by_role("link", name="onboarding run").click()
    models.get_by_role("heading", name=OTHER_REPO).wait_for()


def test_nothing_was_refused_by_the_pages_own_policy(page, onboarded):
    assert [error for error in page.seen.errors if "Content Security Policy" in error or "/ferry" in error] == []
    here = {request for request in page.seen.requests if "/ferry/" in request}
    assert {request.split("/ferry/")[1].split("/")[0] for request in here} == {"runs", "models"}
