"""What the page shows of a text, in a real browser: alternatives, scores, attention, comparisons."""

import math

import pytest
from pages import FIXED, FRAGMENT, PROMPT, done, fragment, label, text_of, written
from playwright.sync_api import expect

from polygpt.inspection import score_tokens


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


def test_a_text_is_no_longer_than_its_models_context(opened):
    page = opened(FRAGMENT + "&view=compare")
    page.evaluate("import('/static/state.js').then(({ visit }) => { visit.server.models[1].context_length = 5; })")
    with page.expect_request(lambda sent: '"mixed"' in (sent.post_data or "") and "completions" in sent.url) as sent:
        page.keyboard.press("Control+Enter")
    assert sent.value.post_data_json["max_tokens"] == 5
    page.wait_for_selector(".verdict:visible")
