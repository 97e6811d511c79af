"""The page in a real browser: Chromium, headless, against a server of tiny models over real sockets."""

import json
import math
import re
import shutil
from urllib.parse import urlsplit

import pytest
import serving
import zoo

from polygpt.inspection import score_tokens

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (pip install playwright)")
expect = sync_api.expect
SECONDS = 60  # that anything may take; on an idle machine nothing takes two
expect.set_options(timeout=SECONDS * 1000)

PROMPT = "the cat sat"
FIXED = {"temperature": 0.7, "top_p": 1.0, "seed": 4}
EXPERTS = {"num_layers": 2, "pattern": [{"feedforward": zoo.MOE}, {"attention": {"num_heads": 2}}]}
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def browser():
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no Chromium on the PATH")
    # Of this module alone: while playwright runs, nothing else in this thread may have an event loop.
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def models():
    return {"tiny": serving.language_model(), "mixed": serving.language_model(seed=1, template=None, **EXPERTS)}


@pytest.fixture(scope="module")
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


def fragment(**state):
    return "&".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in state.items())


@pytest.fixture
def page(opened):
    return opened(FRAGMENT)


FRAGMENT = fragment(temperature=0.7, top_p=1, seed="4", max_tokens=24, text=PROMPT)


def written(models, prompt=PROMPT, name="tiny", tokens=24, **settings):
    return models[name].generate(prompt, max_new_tokens=tokens, logprobs=10, **{**FIXED, **settings})


def text_of(page, at=0, root="#results"):
    """A written text, without the marks of new lines."""
    return page.locator(f"{root} .tokens").nth(at).evaluate("node => node.textContent")


def done(page, root="#results", count=1):
    """Waits for so many texts to be finished."""
    expect(page.locator(f"{root} .sequence-foot:visible")).to_have_count(count)


def label(name):
    """A token where it stands alone: blanks visible."""
    return re.sub("^ | $", "·", name.replace("\n", "↵").replace("\t", "⇥")) or "∅"


# --- Opening ----------------------------------------------------------------------------------------------------------


def test_the_page_names_its_model_within_a_second(opened):
    times = []
    for _ in range(3):
        page = opened()
        paint, ready = page.evaluate(
            "() => ['first-contentful-paint', 'ready'].map((name) => performance.getEntriesByName(name)[0].startTime)"
        )
        assert page.locator("#model").input_value() == "tiny"
        assert "tiny" in page.locator("#facts").inner_text()
        times.append(max(paint, ready))
    assert min(times) < 1000, times


def test_the_server_forbids_inline_code_and_other_origins(opened, server):
    page = opened(ready=False)
    policy = page.request.get(server.url).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "style-src 'self'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"\sstyle=|<style|<script(?![^>]*src=)|\son\w+=", page.request.get(server.url).text())


# --- Writing ----------------------------------------------------------------------------------------------------------


def test_a_text_streams_in_and_is_the_models(page, models, server):
    with server.slowly(0.03):
        page.click("#go")
        page.wait_for_selector("#results .token")
        early = page.locator("#results .token").count()
        assert early < 24
        expect(page.locator("#stop")).to_be_visible()
        done(page)
    expected = written(models)
    assert page.locator("#results .token").count() == len(expected.tokens) > early
    assert text_of(page) == expected.text
    meta = page.locator("#results .meta").inner_text()
    assert "seed 4" in meta
    assert "as long as allowed" in meta
    expect(page.locator("#go")).to_be_visible()


def test_several_samples_stand_side_by_side(opened, models):
    page = opened(FRAGMENT + "&n=3")
    page.keyboard.press("Control+Enter")
    done(page, count=3)
    assert [text_of(page, at) for at in range(3)] == [written(models, seed=4 + at).text for at in range(3)]
    boxes = [page.locator("#results .sequence").nth(at).bounding_box() for at in range(2)]
    assert boxes[0]["y"] == boxes[1]["y"]


def test_writing_again_takes_another_seed(opened):
    page = opened(fragment(max_tokens=24, text=PROMPT, temperature=1.5, top_p=1))
    texts = set()
    for button in ("#go", "#regenerate"):
        page.click(button)
        done(page)
        texts.add(text_of(page))
    assert len(texts) == 2


def test_stopping_frees_the_slot(opened, server):
    page = opened(fragment(max_tokens=900, text=PROMPT, temperature=1, seed="4"))
    with server.slowly(0.02):
        page.click("#go")
        page.wait_for_selector("#results .token")
        page.keyboard.press("Escape")
        done(page)
        server.until(lambda: server.idle)
    assert "stopped" in page.locator("#results .meta").inner_text()
    assert page.locator("#results .token").count() < 900
    expect(page.locator("#problem")).to_be_hidden()


def test_a_model_that_ends_is_said_to(opened, models):
    whole = written(models, tokens=200)
    stop = next(letter for letter in whole.text[3:] if letter.isascii() and letter.isalnum())
    page = opened(FRAGMENT + f"&stop={stop}&max_tokens=200")
    page.click("#go")
    done(page)
    assert "ended by the model or a stop string" in page.locator("#results .meta").inner_text()
    assert text_of(page) == whole.text.partition(stop)[0]


def test_a_schema_makes_json(opened):
    pytest.importorskip("llguidance")
    # Random weights would write blanks forever.
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema |= {"additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    for mode, root in (("completion", "#results"), ("chat", "#chat")):
        page = opened(fragment(mode=mode, max_tokens=60, text=PROMPT, schema=json.dumps(schema), temperature=0.2))
        if mode == "chat":
            page.fill("#chat textarea", "hello")
        page.keyboard.press("Control+Enter")
        done(page, root)
        assert set(json.loads(text_of(page, root=root))) == {"ok"}


def test_a_schema_that_is_no_json_is_said(opened):
    page = opened(fragment(text=PROMPT, schema="{"))
    page.click("#go")
    expect(page.locator("#problem")).to_contain_text("The JSON schema in the settings is not JSON")
    expect(page.locator("#schema-problem")).to_be_visible()


def test_a_conversation(opened, models):
    page = opened(FRAGMENT + "&mode=chat&system=Be brief")
    page.fill("#chat textarea", "hello <b>you</b>")
    page.keyboard.press("Control+Enter")
    done(page, "#chat")
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "hello <b>you</b>"}]
    expected = models["tiny"].chat(messages, max_new_tokens=24, **FIXED)
    assert text_of(page, root="#chat") == expected.text
    assert page.locator("#chat .said").inner_text() == "hello <b>you</b>"
    page.fill("#chat textarea", "and?")
    page.keyboard.press("Control+Enter")
    done(page, "#chat", 2)
    assert page.locator("#chat .message").count() == 4


def test_a_model_without_chat_template_does_not_chat(opened):
    page = opened("model=mixed&mode=chat")
    expect(page.locator("#mode-chat")).to_be_disabled()
    expect(page.locator("#prompt")).to_be_visible()


# --- Seeing -----------------------------------------------------------------------------------------------------------


def test_alternatives_are_shown_and_continued_from(page, models):
    page.click("#go")
    done(page)
    expected = written(models)
    page.hover("#results .token >> nth=5")
    page.wait_for_selector(".alternatives")
    rows = page.locator(".alternatives .row")
    assert rows.count() == 10
    told = [float(text.split()[0]) for text in rows.locator(".p").all_inner_texts() if not text.startswith("<")]
    shares = [100 * math.exp(logprob) for _, logprob in expected.top_logprobs[5]]
    assert told == pytest.approx(shares[: len(told)], abs=0.5)
    with page.expect_request("**/v1/completions") as sent:
        rows.nth(3).click()
    done(page)
    other = expected.top_logprobs[5][3][0]
    prompt = [*models["tiny"].prompt_tokens(PROMPT), *expected.tokens[:5], other]
    assert sent.value.post_data_json["prompt"] == prompt
    expect(page.locator("#results .sequence.writing")).to_have_count(0)
    again = models["tiny"].generate(prompt, max_new_tokens=24, **FIXED)
    kept = [*expected.tokens[:5], other, *again.tokens]
    expect(page.locator("#results .token")).to_have_count(len(kept))
    assert page.locator("#results .token.chosen").count() == 1


def test_alternatives_by_keyboard(page, models):
    page.click("#go")
    done(page)
    expected = written(models)
    page.focus("#results .token >> nth=0")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    page.wait_for_selector(".alternatives button:focus")
    page.keyboard.press("Escape")
    assert page.evaluate("() => document.activeElement.dataset.index") == "2"
    for key in ("Enter", "ArrowDown"):
        page.keyboard.press(key)
    with page.expect_request("**/v1/completions") as sent:
        page.keyboard.press("Enter")
    assert sent.value.post_data_json["prompt"][-1] == expected.top_logprobs[2][1][0]
    done(page)


def test_a_pasted_text_is_seen_without_generating(page, models):
    text = "the cat sat on the mat <i>é漢字</i>"
    page.fill("#prompt", text)
    page.click("#score")
    done(page)
    lm = models["tiny"]
    ids = lm.prompt_tokens(text)
    assert text_of(page) == text
    assert page.locator("#results .token").count() == len(ids)
    scores = score_tokens(lm.model, lm.params, ids)
    mean = -scores.logprobs.mean() / math.log(2)
    assert f"{mean:.2f} bits a token" in page.locator(".chart-summary").inner_text()
    entropy = scores.entropies[:-1].mean() / math.log(2)
    assert f"mean entropy {entropy:.2f} bits" in page.locator(".chart-summary").inner_text()
    levels = [0.5, 1, 2, 3, 4.5, 6, 8, 10, 13]
    expected = [sum(-logprob / math.log(2) >= level for level in levels) for logprob in scores.logprobs]
    found = page.locator("#results .token").evaluate_all("nodes => nodes.map((node) => node.dataset.level ?? null)")
    assert found[0] is None
    assert list(map(int, found[1:])) == expected


# --- Looking inside ---------------------------------------------------------------------------------------------------


def test_attention_lens_and_experts(opened, models, server):
    page = opened(fragment(model="mixed", text="the cat sat on the mat"))
    page.click("#tab-inspect")
    page.wait_for_selector(".map[data-at]")
    assert page.locator(".heads-row").count() == 2
    assert [row.locator(".head").count() for row in page.locator(".heads-row").all()] == [4, 2]
    page.focus(".head[aria-selected=true]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".map[data-at='1.1']")
    page.hover(".strip .token >> nth=4")
    lit = page.locator(".strip .token[data-lit]")
    assert 0 < lit.count() <= 5  # a token attends to itself and to those before it
    assert "attends to" in page.locator(".attention .told").inner_text()
    page.click("#inner-lens")
    page.wait_for_selector(".lens td")
    lm = models["mixed"]
    ids = lm.prompt_tokens("the cat sat on the mat")
    assert page.locator(".lens tbody tr").count() == 2
    last = page.locator(".lens tbody tr >> nth=0").locator("td").all_text_contents()
    top = score_tokens(lm.model, lm.params, ids).top_tokens[-len(last) :, 0].tolist()
    assert last == [label(server.models[1].token_text(token)) for token in top]
    page.click("#inner-experts")
    page.wait_for_selector(".loads li")
    assert page.locator(".loads li").count() == 4
    assert page.locator(".strip .token[data-expert]").count() == len(ids)


def test_looking_into_a_written_text(page, models):
    page.click("#go")
    done(page)
    with page.expect_request("**/v1/inspect") as sent:
        page.click("#results .sequence-actions >> text=Look inside")
    assert sent.value.post_data_json["tokens"] == [*models["tiny"].prompt_tokens(PROMPT), *written(models).tokens]
    page.wait_for_selector(".map[data-at]")


# --- Comparing --------------------------------------------------------------------------------------------------------


def test_two_models_are_compared(opened, models):
    page = opened(FRAGMENT + "&view=compare")
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".verdict:visible")
    texts = [written(models, name=name).text for name in ("tiny", "mixed")]
    assert [text_of(page, at, "#view-compare") for at in range(2)] == texts
    assert "differ" in page.locator(".verdict").inner_text()
    marked = page.locator("#view-compare .token.differs")
    assert marked.count() == 2
    at = next(at for at, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1])
    for column in range(2):
        before = (
            page.locator("#view-compare .tokens")
            .nth(column)
            .evaluate(
                "node => { let n = 0; for (const span of node.children) { if (span.matches('.differs')) return n;"
                " n += span.textContent.length; } }"
            )
        )
        assert before <= at


# --- The whole --------------------------------------------------------------------------------------------------------


def test_a_link_holds_the_text_and_the_settings(opened):
    page = opened()
    page.fill("#prompt", "100 % & more = é\n#2")
    page.fill("#setting-temperature", "0.35")
    page.fill("#setting-seed", "77")
    page.click("#share")
    other = opened(page.url.partition("#")[2])
    assert other.input_value("#prompt") == "100 % & more = é\n#2"
    assert other.input_value("#setting-temperature") == "0.35"
    assert other.input_value("#setting-seed") == "77"
    assert other.input_value("#setting-top_p") == "0.95"


def test_a_link_of_nonsense_opens_the_page(opened):
    page = opened("temperature=hot&messages=[1]&n={&view=none&unknown=1&text=%E0%A4%A")
    assert page.input_value("#setting-temperature") == "0.8"


def test_a_server_that_goes_away_and_comes_back(opened, models):
    with serving.running({"tiny": models["tiny"]}, slots=1) as live:
        page, port = opened(FRAGMENT, url=live.url), live.address[1]
    page.click("#go")
    expect(page.locator("#banner")).to_contain_text("The server does not answer")
    assert page.input_value("#prompt") == PROMPT
    with serving.running({"tiny": models["tiny"]}, slots=1, port=port):
        expect(page.locator("#banner")).to_be_hidden()
        page.click("#go")
        done(page)
        assert text_of(page) == written(models).text
        page.context.close()
    opened.wrong.clear()  # the browser's own word of refused connections


def test_a_text_of_twenty_thousand_characters(opened):
    page = opened()
    text = ("the cat sat on the mat, " * 1000)[:20_000]
    page.fill("#prompt", text)
    began = page.evaluate("() => performance.now()")
    page.focus("#prompt")
    page.keyboard.type("on and on")
    assert page.evaluate("() => performance.now()") - began < 2000
    page.click("#go")
    expect(page.locator("#problem")).to_contain_text(re.compile(r"[\d,]+ tokens.*1,024"))
    page.click("#score")
    expect(page.locator("#results h2")).to_contain_text("The first 1,024 of")
    assert page.locator("#results .token").count() == 1024
    page.hover("#results .token >> nth=30")
    page.wait_for_selector(".alternatives")
    opened.wrong.clear()  # the browser's own word of the refused request


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_view_fits_the_screen_and_is_named(opened, viewport, scheme):
    page = opened(FRAGMENT, viewport=viewport, color_scheme=scheme)
    page.click("#go")
    done(page)
    for view in ("write", "inspect", "compare"):
        page.click(f"#tab-{view}")
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0, view
    unnamed = "nodes => nodes.filter((n) => !(n.textContent.trim() || n.ariaLabel || n.labels?.length)).length"
    assert page.locator("button, select, textarea, input").evaluate_all(unnamed) == 0
    dark = "() => getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/g).every((c) => c < 90)"
    assert page.evaluate(dark) == (scheme == "dark")
    for _ in range(2):  # as the system, light, dark
        page.click("#theme")
    assert page.evaluate(dark)


def test_the_keyboard_reaches_everything(opened):
    page = opened()
    page.keyboard.press("Alt+3")
    expect(page.locator("#view-compare")).to_be_visible()
    page.focus("#tab-compare")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#view-write")).to_be_visible()
    assert page.evaluate("() => document.activeElement.id") == "tab-write"
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Alt+s")
    expect(page.locator("#settings")).to_be_hidden()
    page.keyboard.press("Shift+?")
    expect(page.locator("#shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#shortcuts")).to_be_hidden()


def test_a_server_with_keys_is_asked_with_the_one_that_the_browser_was_given(opened, models):
    with serving.running({"tiny": models["tiny"]}, keys=("secret",), slots=1) as live:
        page = opened(FRAGMENT, url=live.url, http_credentials={"username": "", "password": "secret"})
        page.click("#go")
        done(page)
        assert text_of(page) == written(models).text
        page.context.close()
