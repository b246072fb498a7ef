"""The page in Chromium, against a server that really runs."""

from __future__ import annotations

import shutil

import httpx2
import pytest
from api_tools import BODY, served
from played import PLAN
from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from pissa_core.errors import RepoNotFound

pytestmark = pytest.mark.browser

KEY = "key-of-anna"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
PICTURE = (
    b'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 1"><rect width="2" height="1"/></svg>'
)
FILES = {"config.json": b"{}", "pissa_report/energy.svg": PICTURE}


@pytest.fixture
def browser(tmp_path):
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium and its driver are not installed")
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


# Tests name the server before the browser, so that the browser, and with it every open stream,
# ends first.
@pytest.fixture
def home(make_app):
    with served(make_app(plan_timeout_s=20.0)) as url:
        yield url


@pytest.fixture
def keyed_home(make_app):
    with served(make_app(api_keys=(KEY,))) as url:
        yield url


def complaints(browser):
    """Return what the browser's console complains about: scripts, blocked loads, bad markup."""
    entries = [entry["message"] for entry in browser.get_log("browser")]
    return [entry for entry in entries if "Failed to load resource" not in entry]


def wait(browser, condition):
    # The page redraws as it pleases: what was found may have been replaced by its like.
    replaced = (StaleElementReferenceException, NoSuchElementException)
    return WebDriverWait(browser, 30, ignored_exceptions=replaced).until(condition)


def text_of(browser, css):
    """Return the text of all visible elements that match."""
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])]"
        ".filter((node) => node.checkVisibility()).map((node) => node.innerText).join(' ')",
        css,
    )


def wait_for(browser, css, words):
    wait(browser, lambda _: words in text_of(browser, css))


def fill(browser, **fields):
    for name, value in fields.items():
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(value)


def press(browser, words):
    def pressed(_):
        for button in browser.find_elements(By.TAG_NAME, "button"):
            if button.is_displayed() and button.text == words:
                button.click()
                return True
        return False

    wait(browser, pressed)


def submitted_job(browser):
    wait(browser, lambda _: "#/jobs/" in browser.current_url)
    return browser.current_url.rpartition("/")[2]


def test_a_job_is_submitted_followed_and_shown(home, browser, worker, settings, store):
    browser.get(home)
    wait_for(browser, "#no-jobs", "No jobs yet")
    wait_for(browser, "#ready", "no worker yet")
    fill(browser, model="org/name", rank="2", targets="q_proj, v_proj")
    press(browser, "Submit job")
    job_id = submitted_job(browser)
    request = store.get(job_id).request
    assert request["pissa"]["target_modules"] == ["q_proj", "v_proj"]
    assert request["pissa"]["rank"] == 2
    wait_for(browser, ".events", "queued")
    worker.prepare(job_id)
    claim = worker.start_shard(job_id)
    worker.finish_matrix(claim, 0)
    wait_for(browser, ".bars", "1 of 3")
    assert "running" in text_of(browser, ".detail .pill")
    worker.finish_matrix(claim, 1)
    worker.finish_matrix(claim, 2)
    worker.finish_shard(claim)
    worker.publish(job_id, settings.files_dir / job_id, FILES)
    wait_for(browser, ".detail .pill", "succeeded")
    wait(browser, lambda _: len(browser.find_elements(By.CSS_SELECTOR, "#matrices tbody tr")) == 3)
    assert "75.0 %" in text_of(browser, "#matrices tbody tr")
    assert "pissa_manifest.json" in text_of(browser, ".detail table")
    drawn = "const i = document.querySelector('.pictures img'); return i.complete && i.naturalWidth"
    wait(browser, lambda _: browser.execute_script(drawn))
    browser.get(f"{home}/#/")
    wait_for(browser, "#jobs", "succeeded")
    assert complaints(browser) == []


def test_a_failure_is_told_with_its_hint_and_the_job_resumed(home, browser, worker):
    browser.get(home)
    fill(browser, model="org/nowhere")
    press(browser, "Submit job")
    job_id = submitted_job(browser)
    worker.fail(job_id, RepoNotFound("there is no repo org/nowhere", hint="check the spelling"))
    wait_for(browser, ".detail .notice", "repo_not_found: there is no repo org/nowhere")
    assert "check the spelling" in text_of(browser, ".detail .notice")
    press(browser, "Resume")
    wait_for(browser, ".events", "resumed")
    wait_for(browser, ".detail .pill", "queued")
    assert complaints(browser) == []


def test_a_job_is_cancelled_and_deleted_after_asking(home, browser, store):
    job_id = client_post(home)
    browser.get(f"{home}/#/jobs/{job_id}")
    wait_for(browser, ".detail .pill", "queued")
    press(browser, "Cancel")
    press(browser, "Keep it")
    assert store.get(job_id).status == "queued"
    press(browser, "Cancel")
    press(browser, "Cancel the job")
    wait_for(browser, ".detail .pill", "cancelled")
    press(browser, "Delete")
    press(browser, "Delete the job")
    wait_for(browser, "#no-jobs", "No jobs yet")
    assert complaints(browser) == []


def test_a_refusal_stands_at_its_field(home, browser):
    browser.get(home)
    press(browser, "Submit job")
    wait_for(browser, "#model-error", "which model?")
    fill(browser, model="a b")
    press(browser, "Submit job")
    wait_for(browser, "#model-error", "is not a Hub reference")
    fill(browser, model="org/name", rank="0")
    press(browser, "Submit job")
    wait_for(browser, "#rank-error", "greater than or equal to 1")
    assert text_of(browser, "#model-error") == ""
    browser.find_element(By.TAG_NAME, "summary").click()
    fill(browser, rank="4", advanced='{"svd": {"method": "fast"}}')
    press(browser, "Submit job")
    wait_for(browser, "#advanced-error", "svd.method")
    fill(browser, advanced="{")
    press(browser, "Submit job")
    wait_for(browser, "#advanced-error", "not JSON")
    assert complaints(browser) == []


WORDS = {
    "pissa-to-lora": {"trained": "me/trained", "initial": "me/initial", "output": "me/lora"},
    "pissa-to-base": {"residual": "me/pair", "adapter": "me/trained", "output": "me/plain"},
    "verify": {"original": "org/name", "converted": "me/pair"},
}


def choose(browser, kind):
    browser.find_element(By.CSS_SELECTOR, f"#kind option[value={kind}]").click()


@pytest.mark.parametrize("kind", WORDS)
def test_every_other_kind_has_its_form(home, browser, store, kind):
    browser.get(home)
    fill(browser, model="org/forgotten")
    choose(browser, kind)
    assert not browser.find_element(By.ID, "model").is_displayed()
    assert not browser.find_element(By.ID, "preview").is_displayed()
    press(browser, "Submit job")
    needed = next(iter(WORDS[kind]))
    wait_for(browser, f"#{needed}-error", "which ")
    fill(browser, **WORDS[kind])
    if kind == "pissa-to-lora":
        fill(browser, **{"lora-rank": "0"})
        press(browser, "Submit job")
        wait_for(browser, "#lora-rank-error", "greater than or equal to 1")
        fill(browser, **{"lora-rank": "8", "tolerance": "0.25"})
        browser.find_element(By.ID, "uniform").click()
    press(browser, "Submit job")
    request = store.get(submitted_job(browser)).request
    assert request["kind"] == kind
    output = request.pop("output", None)
    assert (output and output["ref"]) == WORDS[kind].get("output")
    for name in WORDS[kind].keys() - {"output"}:
        assert request[name] == WORDS[kind][name]
    assert "model" not in request
    if kind == "pissa-to-lora":
        assert request["lora"] == {"rank": 8, "tolerance": 0.25, "uniform": True}
    assert complaints(browser) == []


def test_a_verification_s_verdict_is_shown(home, browser, worker):
    body = {"kind": "verify", "original": "org/name", "converted": "me/pair"}
    job_id = httpx2.post(f"{home}/v1/jobs", json=body).json()["id"]
    worker.verify(job_id, passed=False)
    browser.get(f"{home}/#/jobs/{job_id}")
    wait_for(browser, ".detail .figures", "not passed")
    assert complaints(browser) == []


def test_a_plan_is_previewed(home, browser, worker, store):
    browser.get(home)
    fill(browser, model="org/name")
    press(browser, "Preview plan")
    client = store.connection.client
    plans = wait(browser, lambda _: client.keys("pissa:job:plan_*:tasks"))
    worker.tasks.finish(worker.claim(plans[0].split(":")[2], "plan"), PLAN.public())
    wait_for(browser, "#plan", "LlamaForCausalLM")
    assert "layers.2.q_proj" in text_of(browser, "#plan")
    assert store.list(owner=None)[0] == []
    assert complaints(browser) == []


def test_the_key_is_asked_for_and_kept_for_the_session(keyed_home, browser):
    browser.get(keyed_home)
    wait_for(browser, "#notice", "unauthorized")
    fill(browser, key=KEY)
    press(browser, "Use")
    wait_for(browser, "#no-jobs", "No jobs yet")
    fill(browser, model="org/name")
    press(browser, "Submit job")
    submitted_job(browser)
    wait_for(browser, ".events", "queued")
    browser.refresh()
    wait_for(browser, ".events", "queued")
    assert browser.execute_script("return localStorage.length + document.cookie.length") == 0
    assert KEY not in browser.page_source
    assert complaints(browser) == []


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_every_width_and_scheme(home, browser, worker, settings, width, scheme):
    job_id = client_post(home)
    worker.complete(job_id, settings.files_dir / job_id, FILES)
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for path, shown in [("#/", "#jobs"), (f"#/jobs/{job_id}", "#matrices")]:
        browser.get(f"{home}/{path}")
        wait(browser, lambda _, css=shown: text_of(browser, css))
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    bright = sum(map(int, ground.removeprefix("rgb(").removesuffix(")").split(","))) > 3 * 128
    assert bright == (scheme == "light")


def test_the_documentation_draws_without_the_internet(home, browser):
    browser.get(f"{home}/docs")
    wait_for(browser, "#swagger-ui", "/v1/jobs/{job_id}/cancel")
    assert complaints(browser) == []


def client_post(home):
    return httpx2.post(f"{home}/v1/jobs", json=BODY).json()["id"]
