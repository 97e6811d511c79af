"""One server of a tiny model for all tests that leave it as they found it."""

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (pip install 'polygpt[serve]')")

import serving


@pytest.fixture(scope="session")
def lm():
    return serving.language_model()


@pytest.fixture(scope="session")
def shared(lm):
    with serving.running({"tiny": lm}, slots=4, queue=8, comment_seconds=0.2, body_seconds=1.0) as live:
        yield live


@pytest.fixture
def live(shared):
    """The shared server, idle before and after."""
    shared.until(lambda: shared.idle)
    yield shared
    shared.until(lambda: shared.idle)


@pytest.fixture
def client(live):
    with live.client() as client:
        yield client
