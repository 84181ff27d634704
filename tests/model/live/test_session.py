"""A session: the strip is the retrieval report, prompts switch at the next chunk, and nothing is held for nobody."""

import asyncio
import gc
import json
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from seen import video

from memflow_ops.model.live.engine import Engine
from memflow_ops.model.live.session import Limits, LiveSession
from memflow_ops.model.live.viewer import MOST_NOTES, Viewer
from memflow_ops.model.live.world import toy_world
from memflow_ops.model.stories.video import to_pixels
from memflow_ops.model.streaming.streamer import stream
from memflow_ops.model.toy.checkpoint import TOY_WEIGHTS
from memflow_ops.model.toy.language import embed_prompts

REPORTED = ("retrieved", "relevance", "candidates", "activation")


class Page:
    """A viewer whose messages are read at once, each as (JSON, fragment or None)."""

    def __init__(self, most=100):
        self.loop = asyncio.new_event_loop()
        self.viewer = Viewer(self.loop, most)

    def read(self):
        found = []
        while self.viewer._waiting:
            message = self.loop.run_until_complete(self.viewer.take())
            if isinstance(message, str):
                found.append((json.loads(message), None))
            else:
                size = int.from_bytes(message[:4], "big")
                found.append((json.loads(message[4 : 4 + size]), message[4 + size :]))
        return found

    def chunks(self):
        return [words["chunk"] for words, fragment in self.read() if fragment]


def session(world, prompt="a ball in the meadow", seed=3, **limits):
    return LiveSession(world, Limits(**limits), prompt, seed, baseline=True)


def until(true, seconds=60.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_strip_is_the_retrieval_report_and_the_video_is_the_stream(world):
    live, page = session(world), Page()
    live.attach(page.viewer)
    prompts = [*["a ball in the meadow"] * 3, *["an empty sea"] * 3, *["the ball at night"] * 2]
    told = []
    for prompt in prompts:
        live.set_prompt(prompt)
        live.make_chunk()
        told += [words for words, fragment in page.read() if fragment]
    model, settings = world.streamer(world.settings, 0).model, world.settings
    report = list(stream(model, [[prompt] for prompt in prompts], settings, 3, encode=embed_prompts))
    assert len(told) == len(report) == 8 and report[-1].retrieved[0]
    for words, chunk in zip(told, report, strict=True):
        assert words["chunk"] == chunk.index and words["prompt"] == chunk.prompts[0]
        for name in REPORTED:
            assert words[name] == getattr(chunk, name)[0], name
    assert [{name: row[name] for name in REPORTED} for row in live.timeline()["chunks"]] == [
        {name: words[name] for name in REPORTED} for words in told
    ]
    shown = video(b"".join(live.video()))
    expected = np.concatenate([to_pixels(chunk.frames[0]) for chunk in report]).repeat(8, 1).repeat(8, 2)
    assert shown.shape == (24, 256, 512, 3)
    assert np.abs(shown[:, :, :256].astype(int) - expected).mean() < 3
    assert np.abs(shown[:, :, 256:].astype(int) - expected)[-3:].mean() > 3  # without memory it is another video
    live.close()


def test_a_timeline_names_weights_without_the_path_to_them(tmp_path):
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(TOY_WEIGHTS.read_bytes())
    live = session(toy_world(torch.device("cpu"), 4, copy))
    assert live.timeline()["weights"] == "mine.safetensors" and str(tmp_path) not in json.dumps(live.timeline())
    live.close()


def test_pictures_are_there_for_every_frame_that_can_be_remembered(world):
    live = session(world)
    live.attach(Page().viewer)
    for _ in range(4):
        live.make_chunk()
    remembered = {frame for row in live.rows for frame in row["candidates"]}
    assert remembered and all(live.picture(frame)[:4] == b"\x89PNG" for frame in remembered)
    assert live.picture(4) is None and live.picture(-1) is None and live.picture(10**9) is None
    live.close()


def test_the_same_seed_is_the_same_video_and_another_is_another(world):
    live = session(world)
    videos = []
    for seed in (3, 3, 4):
        live.restart(seed)
        live.make_chunk()
        live.make_chunk()
        assert [row["chunk"] for row in live.rows] == [0, 1]
        videos.append(b"".join(live.video()))
    assert videos[0] == videos[1] != videos[2]
    live.close()


def test_chunks_of_the_old_prompt_that_wait_are_dropped(world):
    live, page = session(world), Page()
    live.attach(page.viewer)
    for _ in range(3):
        live.make_chunk()
    live.set_prompt("an empty sea")
    live.make_chunk()
    told = page.read()
    assert [words["chunk"] for words, fragment in told if fragment] == [3]
    assert [words["type"] for words, _ in told] == ["session", "prompt", "chunk"] and page.viewer.dropped == 3
    assert told[1][0]["takes_effect"] == 3
    live.close()


def test_a_slow_viewer_gets_the_newest_chunk_and_holds_up_nobody(world):
    live, slow, quick = session(world), Page(most=2), Page(most=2)
    live.attach(slow.viewer)
    live.attach(quick.viewer)
    seen = []
    for _ in range(6):
        live.make_chunk()
        seen += quick.chunks()
    assert seen == [0, 1, 2, 3, 4, 5] and slow.chunks() == [4, 5] and live.metrics()["dropped_chunks"] == 4
    for number in range(2 * MOST_NOTES):
        live.say(number=number)
        quick.read()
    assert len(slow.viewer._waiting) <= MOST_NOTES  # what is never read does not pile up
    live.close()


def test_a_fork_goes_on_from_here_and_leaves_its_origin_alone(world):
    alone, live = session(world), session(world)
    for prompt in ["a ball in the meadow"] * 3 + ["an empty sea"] * 2:
        for one in (alone, live):
            one.set_prompt(prompt)
            one.make_chunk()
    child = live.fork("the ball at night")
    assert child.name != live.name and child.rows == live.rows
    child.make_chunk()
    for one in (alone, live):
        one.make_chunk()
    assert b"".join(alone.video()) == b"".join(live.video())
    alone.set_prompt("the ball at night")
    same = session(world)
    for prompt in ["a ball in the meadow"] * 3 + ["an empty sea"] * 2 + ["the ball at night"]:
        same.set_prompt(prompt)
        same.make_chunk()
    assert b"".join(child.video()) == b"".join(same.video())
    assert [row["retrieved"] for row in child.rows] == [row["retrieved"] for row in same.rows]
    for one in (alone, live, child, same):
        one.close()


def test_a_session_that_is_started_again_while_it_is_forked_gives_no_fork(world):
    live = session(world)
    live.make_chunk()
    live.make_chunk()
    fork = live._sides[0].streamer.fork

    def restarted():
        live.restart()
        return fork()

    live._sides[0].streamer.fork = restarted
    with pytest.raises(ValueError, match="was started again"):
        live.fork("an empty sea")
    live.make_chunk()
    assert [row["chunk"] for row in live.rows] == [0]
    live.close()


def test_the_bank_may_be_int8_and_stand_at_bounded_positions():
    world = toy_world(torch.device("cpu"), 40, changes={"steps": 2, "bank_dtype": "int8", "positions": "bounded"})
    live = session(world)
    for _ in range(4):
        live.make_chunk()
    child = live.fork(live.prompt)
    for one in (live, child):
        one.make_chunk()
    assert b"".join(live.video()) == b"".join(child.video()) and live.rows[-1]["retrieved"]
    assert live.timeline()["settings"]["bank_dtype"] == "int8"
    live.close()
    child.close()


def test_a_restart_while_a_chunk_is_made_throws_that_chunk_away(world):
    live, page = session(world), Page()
    live.attach(page.viewer)
    started, going_on = threading.Event(), threading.Event()
    decode = live.encoder.encode

    def slow(*arguments):
        started.set()
        assert going_on.wait(10)
        return decode(*arguments)

    live.encoder.encode = slow
    work = threading.Thread(target=live.make_chunk)
    work.start()
    assert started.wait(10)
    live.restart(9)
    going_on.set()
    work.join()
    assert not live.rows and page.chunks() == [] and b"".join(live.video()) == live.encoder.start
    live.make_chunk()
    assert [row["chunk"] for row in live.rows] == [0] and live.seed == 9
    live.close()


def test_a_session_ends_at_its_length_and_starts_again(world):
    live, page = session(world, chunks=2), Page()
    live.attach(page.viewer)
    for _ in range(2):
        live.make_chunk()
    assert not live.wants_chunk(time.monotonic() + 100)
    assert page.read()[-1][0] == {"type": "ended", "why": "the session has reached its 2 chunks; start it again"}
    live.restart()
    assert live.wants_chunk(time.monotonic())
    live.close()


def test_what_has_ended_is_not_forked_and_promises_no_prompt(world):
    live, page = session(world, chunks=2), Page()
    live.attach(page.viewer)
    for _ in range(2):
        live.make_chunk()
    page.read()
    live.set_prompt("an empty sea")
    assert [words["type"] for words, _ in page.read()] == ["ended"]
    with pytest.raises(ValueError, match="has reached its 2 chunks"):
        live.fork("an empty sea")
    live.restart()
    live.make_chunk()
    assert live.rows[0]["prompt"] == "an empty sea"
    live.close()
    live.restart()  # by a page that does not know yet
    assert live._recording.closed


def test_a_video_that_is_being_saved_is_not_mixed_with_the_one_after_a_restart(world):
    live = session(world)
    for _ in range(2):
        live.make_chunk()
    whole, saving = b"".join(live.video()), live.video()
    pieces = [next(saving)]
    live.restart(9)
    for _ in range(3):
        live.make_chunk()
    assert b"".join([*pieces, *saving]) == whole
    live.close()


def test_a_chunk_that_comes_while_the_player_is_stopped_has_missed_nothing(world, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("memflow_ops.model.live.session.time.monotonic", lambda: now[0])
    live, page = session(world), Page()
    live.attach(page.viewer)
    live.make_chunk()
    decode = live.encoder.encode

    def paused(*arguments):
        live.pause(True)
        now[0] += 50
        return decode(*arguments)

    live.encoder.encode = paused
    live.make_chunk()
    now[0] += 50
    live.pause(False)
    assert live.latency.missed == 0 and live.latency.ahead(now[0]) == pytest.approx(2 * 0.375)
    live.close()


def test_a_fork_waits_for_its_page_however_short_sessions_are_kept(world):
    live, page = session(world, keep_seconds=0.0), Page()
    assert not live.over(time.monotonic() + 50) and live.over(time.monotonic() + 70)
    live.attach(page.viewer)
    live.detach(page.viewer)
    assert live.over(time.monotonic() + 0.1)
    live.close()


def test_pauses_and_absences_are_no_missed_deadlines(world, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("memflow_ops.model.live.session.time.monotonic", lambda: now[0])
    live, page = session(world), Page()
    live.attach(page.viewer)
    live.make_chunk()
    live.pause(True)
    now[0] += 50
    live.pause(False)
    live.detach(page.viewer)
    now[0] += 50
    live.attach(page.viewer)
    live.make_chunk()
    assert live.latency.missed == 0
    now[0] += 5
    live.make_chunk()
    assert live.latency.missed == 1 and live.latency.stalled == pytest.approx(5 - 2 * 0.375)
    live.close()


def test_the_engine_makes_chunks_for_all_who_watch_and_frees_who_is_gone(world):
    with Engine(world, Limits(sessions=2, keep_seconds=0.2)) as engine:
        pages = [Page(), Page()]
        both = [engine.open(), engine.open("a star at sea", seed=5)]
        for page, one in zip(pages, both, strict=True):
            one.attach(page.viewer)
        engine.wake()
        until(lambda: all(len(one.rows) >= 2 for one in both))
        with pytest.raises(ValueError, match="all 2 places are taken"):
            engine.open()
        gone = weakref.ref(both[0])
        name, late = both[0].name, both[0].attach
        both[0].detach(pages[0].viewer)
        both[0].pause(False)
        del both[0]
        until(lambda: engine.find(name) is None)
        with pytest.raises(ValueError, match="that session is over"):
            late(pages[0].viewer)
        del late
        until(lambda: gc.collect() >= 0 and gone() is None)
        made = len(both[0].rows)
        both[0].set_prompt("an empty sea")
        until(lambda: len(both[0].rows) > made)


def test_a_session_is_kept_for_a_page_that_comes_back(world):
    with Engine(world, Limits(keep_seconds=30)) as engine:
        live, page = engine.open(), Page()
        live.attach(page.viewer)
        engine.wake()
        until(lambda: len(live.rows) >= 2)
        live.detach(page.viewer)
        until(lambda: not live._making)
        made = len(live.rows)
        time.sleep(0.5)
        assert len(live.rows) == made  # nobody watches, so nothing is made
        again = Page()
        engine.find(live.name).attach(again.viewer)
        engine.wake()
        until(lambda: len(live.rows) > made)
        told = again.read()
        assert told[0][0]["session"] == live.name and len(told[0][0]["rows"]) == made
        assert told[1][0]["chunk"] == made - 1 and told[1][1]  # the newest chunk comes at once
        assert told[2][0]["chunk"] == made


def test_what_fails_ends_one_session_and_no_other(world):
    with Engine(world, Limits()) as engine:
        bad, good = engine.open(), engine.open()
        pages = [Page(), Page()]

        def fail():
            raise MemoryError("no room")

        bad.make_chunk = fail
        bad.attach(pages[0].viewer)
        good.attach(pages[1].viewer)
        engine.wake()
        until(lambda: bad.ended and len(good.rows) >= 2)
        assert "MemoryError: no room" in pages[0].read()[-1][0]["why"] and not good.ended


def test_a_chunk_that_fails_after_a_restart_ends_nothing(world):
    with Engine(world, Limits()) as engine:
        live, page = engine.open(), Page()
        make = live.make_chunk

        def fail():
            live.make_chunk = make
            live.restart()
            raise MemoryError("no room")

        live.make_chunk = fail
        live.attach(page.viewer)
        engine.wake()
        until(lambda: len(live.rows) >= 2)
        assert not live.ended and engine.failed == 1


def test_a_fork_by_the_engine_takes_a_place(world):
    with Engine(world, Limits(sessions=2)) as engine:
        live, page = engine.open(), Page()
        live.attach(page.viewer)
        engine.wake()
        until(lambda: len(live.rows) >= 2)
        answers = []
        engine.fork(live, "an empty sea", answers.append)
        until(lambda: answers)
        assert engine.find(answers[0].name) is answers[0] and answers[0].prompt == "an empty sea"
        engine.fork(live, "an empty sea", answers.append)
        until(lambda: len(answers) == 2)
        assert "all 2 places are taken" in answers[1]
