"""A headless Chromium and a server of tiny models for all tests of the page."""

import shutil
from urllib.parse import urlsplit

import pytest
import serving
import zoo

pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")

from pages import DESKTOP, FRAGMENT, SECONDS
from playwright.sync_api import sync_playwright

EXPERTS = {"num_layers": 2, "pattern": [{"feedforward": zoo.MOE}, {"attention": {"num_heads": 2}}]}


@pytest.fixture(scope="package")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    # Of this folder alone: while playwright runs, nothing else in this thread may have an event loop.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def models():
    return {"tiny": serving.language_model(), "mixed": serving.language_model(seed=1, template=None, **EXPERTS)}


@pytest.fixture(scope="package")
def server(models):
    with serving.running(models, slots=4) as live, live.client() as client:
        for name in models:  # compiled before anybody waits
            client.with_options(timeout=600).completions.create(model=name, prompt="a", max_tokens=2, logprobs=1)
        yield live


@pytest.fixture
def opened(browser, server):
    """Opens pages at an address; at the end nothing may have gone wrong in any, and nothing was asked of others."""
    contexts, wrong, asked = [], [], []

    def opened(fragment="", url=server.url, viewport=DESKTOP, ready=True, **options):
        context = browser.new_context(viewport=viewport, **options)
        context.set_default_timeout(SECONDS * 1000)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{url}/#{fragment}")
        if ready:
            page.wait_for_selector("body[data-ready]", state="attached")
        return page

    opened.wrong = wrong
    yield opened
    for context in contexts:
        context.close()
    assert not wrong
    assert {urlsplit(url).hostname for url in asked} <= {"127.0.0.1"}


@pytest.fixture
def page(opened):
    return opened(FRAGMENT)
