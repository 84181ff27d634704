"""The page in a headless Chromium: it plays, obeys, shows the retrieval report, and comes back. Skipped without one."""

import json
import time

import pytest
from browser import CHROMIUM, browsing
from served import hear, serving, until

from memflow_ops.model.live.world import toy_world

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium (on Debian: apt-get install chromium)")

PLAYS = "document.querySelector('video').currentTime > 0.2"
STRIP = """({
    chunk: Number(document.querySelector('#memory').dataset.chunk),
    frames: [...document.querySelectorAll('#memory li[data-frame]')].map((li) => ({...li.dataset, kind: li.className})),
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("chromium")) as running:
        yield running


@pytest.fixture(scope="module")
def served(world):
    with serving(world, sessions=20, keep_seconds=5.0) as running:
        yield running


def text(tab, name):
    return tab.value(f"document.getElementById('{name}').textContent")


def write(tab, prompt):
    tab.value(f"document.getElementById('prompt').value = {json.dumps(prompt)}")
    tab.value("document.getElementById('prompt-form').requestSubmit()")


def name_of(tab):
    return tab.value("new URLSearchParams(location.hash.slice(1)).get('session')")


# Keeps what the page says of the first frames of a star, however late the test looks.
FIRST_STAR = """
    new MutationObserver((_, observer) => {
        const said = document.getElementById('now').textContent;
        if (said.includes('star')) { window.firstStar = said; observer.disconnect(); }
    }).observe(document.getElementById('now'), {childList: true, characterData: true, subtree: true})
"""


def test_it_plays_and_a_prompt_appears_within_two_chunks(browser):
    import torch

    whole = toy_world(torch.device("cpu"), chunks=40)  # with all of its steps
    with serving(whole) as served, browser.tab(f"http://{served.address}/") as tab:
        tab.until(PLAYS)
        assert float(text(tab, "first-page").split()[0]) > 0
        tab.until("document.getElementById('now').textContent.includes('chunk 3')")
        live = served.engine.find(name_of(tab))
        tab.value(FIRST_STAR)
        write(tab, "a star in the desert")
        tab.until("document.getElementById('status').textContent.includes('begins with chunk')")
        said = int(text(tab, "status").rstrip(".").split()[-1]) - 1
        tab.until("window.firstStar")
        first = next(row["chunk"] for row in live.rows if row["prompt"] == "a star in the desert")
        assert first == said
        # What was made under the old prompt and not yet shown is left out.
        shown = tab.value("window.firstStar")
        assert f"chunk {first + 1}," in shown or f"chunk {first + 2}," in shown


def test_the_strip_is_the_retrieval_report(browser, served):
    with browser.tab(f"http://{served.address}/") as tab:
        tab.until(PLAYS)
        for prompt in ("an empty sea", "the ball at night"):
            write(tab, prompt)
            tab.until(f"document.getElementById('now').textContent.includes('{prompt}')")
            time.sleep(0.5)
        tab.until("document.querySelectorAll('#memory .retrieved').length > 0")
        tab.until("[...document.querySelectorAll('#memory img')].every((image) => image.naturalWidth)")
        seen = tab.value(STRIP)
        _, content, _ = served.get(f"/sessions/{name_of(tab)}/timeline.json")
        row = json.loads(content)["chunks"][seen["chunk"]]
        assert [int(item["frame"]) for item in seen["frames"]] == row["candidates"]
        assert [float(item["share"]) for item in seen["frames"]] == row["activation"]
        kept = {int(item["frame"]): float(item["relevance"]) for item in seen["frames"] if item["kind"] == "retrieved"}
        assert kept == dict(zip(row["retrieved"], row["relevance"], strict=True))
        shares = tab.value("[...document.querySelectorAll('#memory .share')].map((item) => item.textContent)")
        assert shares == [f"{int(100 * share + 0.5)} %" for share in row["activation"]]


def test_a_bank_that_is_attended_to_in_full_is_named(browser):
    import torch

    released = toy_world(torch.device("cpu"), chunks=20, changes={"steps": 1, "memory": "released"})
    with serving(released) as served, browser.tab(f"http://{served.address}/") as tab:
        tab.until("document.getElementById('memory').textContent.startsWith('in the bank: frames 0')")
        row = served.engine.find(name_of(tab)).rows[int(tab.value("document.getElementById('memory').dataset.chunk"))]
        assert row["retrieved"] and not row["candidates"]


def test_pause_restart_fork_and_refusals(browser, served):
    with browser.tab(f"http://{served.address}/") as tab:
        tab.until(PLAYS)
        tab.value("document.getElementById('pause').click()")
        tab.until("document.getElementById('pause').textContent == 'Resume' && document.querySelector('video').paused")
        live = served.engine.find(name_of(tab))
        made = len(live.rows)
        time.sleep(0.5)
        assert len(live.rows) <= made + 1
        tab.value("document.getElementById('pause').click()")
        until(lambda: len(live.rows) > made + 1)
        write(tab, "a dragon at sea")
        tab.until("document.getElementById('status').className == 'problem'")
        assert "unknown word 'dragon'" in text(tab, "status")
        tab.value("document.getElementById('prompt').value = 'an empty sea'; document.getElementById('fork').click()")
        tab.until("document.querySelector('#status a')")
        link = tab.value("document.querySelector('#status a').href")
        with browser.tab(link) as other:
            other.until("document.getElementById('now').textContent.includes('an empty sea')")
            assert name_of(other) != live.name
        tab.value("document.getElementById('seed').value = 11; document.getElementById('restart').click()")
        until(lambda: live.seed == 11 and live.rows)
        tab.until(PLAYS)
        assert served.engine.failed == 0


def test_a_lost_connection_and_a_reload_come_back_to_the_same_session(browser, served):
    with browser.tab(f"http://{served.address}/") as tab:
        tab.until(PLAYS)
        name = name_of(tab)
        tab.value("socket.close()")
        tab.until("document.getElementById('status').textContent.includes('Trying again')")
        tab.until("socket.readyState == 1 && !document.getElementById('status').textContent")
        at = tab.value("document.querySelector('video').currentTime")
        tab.until(f"document.querySelector('video').currentTime > {at} + 0.5")
        tab.call("Page.reload")
        tab.until(PLAYS)
        assert name_of(tab) == name and tab.value("document.querySelectorAll('#past li').length") > 2
        live = served.engine.find(name)
    until(lambda: live.viewers == 0)
    until(lambda: served.engine.find(name) is None)  # closed for longer than it is kept


def test_two_pages_of_one_session_see_the_same(browser, served):
    with browser.tab(f"http://{served.address}/") as one:
        one.until(PLAYS)
        name = name_of(one)
        with browser.tab(f"http://{served.address}/#session={name}") as two, served.page(session=name) as third:
            two.until(PLAYS)
            write(two, "an empty sea")
            one.until("document.getElementById('now').textContent.includes('an empty sea')")
            hear(third, "prompt")


def test_who_prefers_less_motion_starts_the_video_by_hand(browser, served):
    with browser.tab(f"http://{served.address}/", motion="reduce") as tab:
        tab.until("!document.getElementById('start').hidden")
        assert tab.value("socket") is None
        tab.value("document.getElementById('start').focus()")
        tab.press("Enter")
        tab.until(PLAYS)


def test_the_keyboard_reaches_everything_and_narrow_pages_do_not_scroll_sideways(browser, served):
    with browser.tab(f"http://{served.address}/", width=320, height=700, scheme="dark") as tab:
        tab.until(PLAYS)
        assert tab.value("document.documentElement.scrollWidth") <= 320
        reached = set()
        for _ in range(30):
            tab.press("Tab")
            reached.add(tab.value("document.activeElement.id || document.activeElement.textContent"))
        assert reached >= {"pause", "restart", "seed", "save-video", "prompt", "send", "fork", "an empty sea", "past"}
        tab.value("document.getElementById('prompt').focus(); document.getElementById('prompt').select()")
        tab.type("an empty desert")
        tab.press("Enter")
        tab.until("document.getElementById('now').textContent.includes('an empty desert')")
        names = tab.value("[...document.querySelectorAll('button, input, video, ol, section')].filter((item) => "
                          "!item.textContent.trim() && !item.labels?.length && !item.getAttribute('aria-label') "
                          "&& !item.getAttribute('aria-labelledby')).map((item) => item.id)")  # fmt: skip
        assert names == []


def test_a_token_comes_with_the_address_and_does_not_stay_in_it(browser, world):
    token = "a-token-of-enough-letters"
    with serving(world, token=token) as served, browser.tab(f"http://{served.address}/#token={token}") as tab:
        tab.until(PLAYS)
        assert token not in tab.value("location.href") and name_of(tab)
        size = tab.value("get(`sessions/${info.session}/video.mp4`).then((content) => content.size)")
        assert size > 1000
        tab.value("document.getElementById('fork').click()")
        tab.until("document.querySelector('#status a')")
        with browser.tab(tab.value("document.querySelector('#status a').href")) as other:
            other.until(PLAYS)
    with serving(world, token=token) as served, browser.tab(f"http://{served.address}/") as tab:
        tab.until("document.getElementById('status').textContent.includes('token is missing or wrong')")
