"""What tests of the page share: addresses that hold settings, and what stands on the page."""

import json
import re

from playwright.sync_api import expect

SECONDS = 60  # that anything may take; on an idle machine nothing takes two
expect.set_options(timeout=SECONDS * 1000)

PROMPT = "the cat sat"
FIXED = {"temperature": 0.7, "top_p": 1.0, "seed": 4}
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 800}


def fragment(**state):
    return "&".join(f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in state.items())


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
