"""Writing on the page, in a real browser: completions, samples, schemas, chat."""

import json

import pytest
from pages import FIXED, FRAGMENT, PROMPT, done, fragment, text_of, written
from playwright.sync_api import expect


def test_a_text_streams_in_and_is_the_models(page, models, server):
    with server.slowly(0.03):
        page.click("#go")
        page.wait_for_selector("#results .token", state="attached")
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
        page.wait_for_selector("#results .token", state="attached")
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
