"""The streaming loop against a slow one that keeps every frame in a dictionary and attends to a concatenation."""

import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from slow_stream import SlowStream
from torch import Tensor

from memflow_ops.cache import attend as attend_module
from memflow_ops.cache.policies import Relevance, Retrieved
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming import activation as activation_module
from memflow_ops.model.streaming.inputs import pixel_coordinates
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer, stream
from memflow_ops.model.toy.language import TEXT_DIM, embed_prompts
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig
from memflow_ops.ops import registration

SIZE = 16  # pixels; patches of 4 make 16 tokens per frame
EVERYTHING = 10_000
STORY = ("a ball in the meadow", "a box in the sea", "an empty desert", "a ball at night")
OTHER = ("a star at night", "a star at night", "a ring in the desert", "an empty sea")


@pytest.fixture(scope="module")
def model() -> CausalVideoModel:
    torch.manual_seed(3)
    sizes = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "in_dim": 5, "out_dim": 3}
    config = ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=4, patch_size=(1, 4, 4), prediction="x0")
    model = CausalVideoModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name or "norm_k" in name:  # sharper attention: what is attended to matters
            parameter.data.mul_(2)
    return model


def settings_of(**changes) -> StreamSettings:
    defaults = {"height": SIZE, "width": SIZE, "top_k": 4, "block_size": 4, "query_group": 16, "device_frames": 40}
    return StreamSettings(**{**defaults, "steps": 2, "shift": 7.0, **changes})


def run(model, prompts, seed=0, **changes) -> list[Chunk]:
    return list(stream(model, prompts, settings_of(**changes), seed, encode=embed_prompts))


def frames_of(chunks: Sequence[Chunk]) -> Tensor:
    return torch.cat([chunk.frames for chunk in chunks], dim=2)


def assert_same_video(got: Sequence[Chunk], want: Sequence[Chunk], tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(frames_of(got), frames_of(want), rtol=0, atol=tolerance)


MODES = {
    "none": {"memory": "none"},
    "sink": {"memory": "sink"},
    "full": {"memory": "full"},
    "memflow": {"memory": "memflow", "top_k": EVERYTHING},
    "memflow-window-9": {"memory": "memflow", "top_k": EVERYTHING, "window_frames": 9, "sink_frames": 1},
    "full-window-9": {"memory": "full", "window_frames": 9, "sink_frames": 4},
    "sink-window-9": {"memory": "sink", "window_frames": 9, "sink_frames": 5},
    "no-recache": {"memory": "memflow", "top_k": EVERYTHING, "recache": False},
    "host": {"memory": "memflow", "top_k": EVERYTHING, "device_frames": 4, "host_frames": 30, "relevance": "random"},
    "window-is-chunk": {"memory": "full", "window_frames": 3},
    "chunk-1": {"memory": "full", "chunk_frames": 1, "window_frames": 4, "sink_frames": 2},
    "kept": {"memory": "memflow", "top_k": EVERYTHING, "reselect": "chunk"},
    "one-selection": {"memory": "memflow", "top_k": EVERYTHING, "query_group": None},
    "one-selection-kept": {"memory": "memflow", "top_k": EVERYTHING, "query_group": None, "reselect": "chunk"},
    "fewer-groups": {"memory": "memflow", "top_k": EVERYTHING, "query_group": 7, "bank_frames": 1, "sink_frames": 0},
}


@pytest.mark.parametrize("changes", MODES.values(), ids=MODES)
def test_against_the_slow_stream(model, changes):
    settings = settings_of(**changes)
    prompts = chunk_prompts([STORY], 9, settings.chunk_frames)
    streamer = Streamer(model, 1, settings, seed=5, encode=embed_prompts)
    noises, got = [], []
    for prompt in prompts:
        noises.append(streamer._noise()[0])
        got.append(streamer.next_chunk(prompt))
    banks = [chunk.retrieved[0] for chunk in got] if settings.memory == "memflow" else ()
    slow = SlowStream(model, settings, banks)
    want = slow.run([prompt for (prompt,) in prompts], noises)
    torch.testing.assert_close(frames_of(got), torch.cat(want, dim=2), rtol=0, atol=2e-4)
    candidates = streamer.cache.candidates()
    for row, frame in enumerate(candidates.frames[0]):  # what retrieval compares: keys before RoPE
        for layer, (k, _) in enumerate(slow.first[frame]):
            torch.testing.assert_close(candidates.means[layer, 0, row, 0], k[0].mean(0), rtol=0, atol=2e-4)


def test_memflow_with_everything_activated_is_full_memory(model):
    prompts = chunk_prompts([STORY, OTHER], 12)
    full = run(model, prompts, memory="full")
    memflow = run(model, prompts, memory="memflow", bank_frames=20, top_k=EVERYTHING)
    assert_same_video(memflow, full)
    assert memflow[-1].candidates[0] == [0, 1, 2, *range(3, 42, 3)]


def test_modes_agree_until_something_has_left_the_window_and_differ_afterwards(model):
    prompts = chunk_prompts([STORY], 9)
    videos = {memory: run(model, prompts, memory=memory) for memory in ("none", "sink", "memflow", "full")}
    for memory, chunks in videos.items():
        assert_same_video(chunks[:2], videos["none"][:2], tolerance=1e-5)
        for other in videos:
            if other != memory:
                assert (frames_of(chunks[4:]) - frames_of(videos[other][4:])).abs().max() > 1e-2


def test_same_seed_same_video(model):
    prompts = chunk_prompts([STORY], 9)
    first, again, other = (run(model, prompts, seed=seed) for seed in (4, 4, 5))
    assert torch.equal(frames_of(first), frames_of(again))
    assert first[-1].retrieved == again[-1].retrieved and first[-1].relevance == again[-1].relevance
    assert (frames_of(first) - frames_of(other)).abs().max() > 0.1


def test_noise_depends_on_seed_and_chunk_alone(model):
    prompts = chunk_prompts([STORY], 3)
    noises = {}
    for memory in ("none", "memflow"):
        streamer = Streamer(
            model, 1, settings_of(memory=memory, stochastic=memory == "none"), seed=1, encode=embed_prompts
        )
        noises[memory] = []
        for prompt in prompts:
            noises[memory].append(streamer._noise()[0])
            streamer.next_chunk(prompt)
    assert torch.equal(torch.stack(noises["none"]), torch.stack(noises["memflow"]))
    values = torch.stack(noises["none"]).flatten(1)
    assert (torch.corrcoef(values) - torch.eye(len(values))).abs().max() < 0.15, "chunks have noise of their own"


@pytest.mark.parametrize("stochastic", [False, True], ids=["euler", "stochastic"])
@pytest.mark.parametrize("memory", ["memflow", "full"])
def test_a_batch_of_two_is_two_runs(model, memory, stochastic):
    """The stories switch at different chunks, retrieve different frames, and outgrow the device."""
    sizes = {"device_frames": 5, "host_frames": 2} if memory == "memflow" else {}
    changes = {"memory": memory, "stochastic": stochastic, "window_frames": 9, **sizes}
    together = run(model, chunk_prompts([STORY, OTHER], 9), seed=7, **changes)
    for story, prompts in enumerate((STORY, OTHER)):
        alone = run(model, chunk_prompts([prompts], 9), seed=7 + story, **changes)
        got = frames_of(together)[story : story + 1]
        torch.testing.assert_close(got, frames_of(alone), rtol=0, atol=1e-4)
        assert [chunk.retrieved[story] for chunk in together] == [chunk.retrieved[0] for chunk in alone]
        for both, single in zip(together, alone, strict=True):
            assert both.activation[story] == pytest.approx(single.activation[0])
    retrieved = [chunk.retrieved for chunk in together]
    assert memory == "full" or any(first != second for first, second in retrieved)
    seeds = run(model, chunk_prompts([STORY, OTHER], 9), seed=[7, 8], **changes)
    assert torch.equal(frames_of(seeds), frames_of(together))


# -------------------------------------------------------------------------------------------------- switches, retrieval


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_a_switch_takes_effect_at_once(model, score):
    """The first chunk after it retrieves by the new prompt, and sees the window's keys as the new text makes them."""
    settings = settings_of(relevance=score, window_frames=9, bank_frames=2, redundancy=0.99)
    streamer = Streamer(model, 1, settings, encode=embed_prompts)
    for _ in range(9):
        streamer.next_chunk([STORY[0]])
    text = {prompt: model.encode_text(embed_prompts([prompt])) for prompt in (STORY[0], OTHER[2])}
    candidates, policy = streamer.cache.candidates(), Relevance(2, score, 0.99)
    two = torch.tensor([2], dtype=torch.int32)
    choice = {prompt: policy.choose(candidates, [keys for keys, _ in layers], two) for prompt, layers in text.items()}
    chunk = streamer.next_chunk([OTHER[2]])
    assert chunk.retrieved == choice[OTHER[2]].frames
    assert chunk.relevance[0] == pytest.approx(choice[OTHER[2]].scores[0], abs=1e-6)
    assert choice[OTHER[2]].scores != choice[STORY[0]].scores


def test_retrieval_by_two_prompts_differs(model):
    """So that the test above means something: what is retrieved does depend on the prompt."""
    streamer = Streamer(model, 1, settings_of(), encode=embed_prompts)
    for prompt in itertools.chain.from_iterable(chunk_prompts([STORY], 9)):
        streamer.next_chunk([prompt])
    candidates, two = streamer.cache.candidates(), torch.tensor([2], dtype=torch.int32)
    places, characters = ("meadow", "desert", "sea", "night"), ("ball", "box", "star", "ring")
    chosen = set()
    for who, where in itertools.product(characters, places):
        text = model.encode_text(embed_prompts([f"a {who} in the {where}"]))
        chosen.add(tuple(Relevance(3).choose(candidates, [keys for keys, _ in text], two).frames[0]))
    assert len(chosen) > 1


def test_recached_window_equals_a_fresh_pass_under_the_new_text(model):
    streamer = Streamer(model, 1, settings_of(memory="none"), encode=embed_prompts)
    past = [streamer.next_chunk([STORY[0]]).frames for _ in range(5)][-1]
    streamer.next_chunk([STORY[1]])
    assert streamer.cache.window_frames() == list(range(12, 18))

    fresh = []

    def alone(layer, q, k, v):
        q, k = (model.rotate(x, torch.arange(12, 15), (4, 4)) for x in (q, k))
        fresh.append((k, v))
        parts = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(*parts).transpose(1, 2)

    text = model.encode_text(embed_prompts([STORY[1]]))
    with torch.no_grad():
        model(past, torch.zeros(1, 3), text, alone, pixel_coordinates(3, SIZE, SIZE))
    streamer.cache.begin_chunk()  # opens the views; it will overwrite the re-cached chunk, but has not yet
    for layer, (k, v) in enumerate(fresh):
        for got, want in zip(streamer.cache.window(layer), (k, v), strict=True):
            torch.testing.assert_close(got[:, : k.shape[1]], want, rtol=0, atol=1e-5)


def test_padding_of_the_text_does_not_matter(model):
    """Whether the encoder pads or the model does: same keys, same frames retrieved."""
    prompts = chunk_prompts([STORY], 9)
    plain = run(model, prompts)
    padded = list(stream(model, prompts, settings_of(), encode=lambda p: F.pad(embed_prompts(p), (0, 0, 0, 1))))
    assert torch.equal(frames_of(plain), frames_of(padded))
    assert [chunk.relevance for chunk in plain] == [chunk.relevance for chunk in padded]


def test_stories_with_texts_of_different_length(model):
    """Each story's padding is its own: a batch whose second text is shorter is two single runs."""

    def encode(prompts: Sequence[str]) -> Tensor:
        embeddings = F.pad(embed_prompts(prompts), (0, 0, 0, 1))
        for row, prompt in zip(embeddings, prompts, strict=True):
            if prompt in STORY:
                row[2:] = 0.5
        return embeddings

    together = list(stream(model, chunk_prompts([STORY, OTHER], 9), settings_of(), encode=encode))
    for story, prompts in enumerate((STORY, OTHER)):
        alone = list(stream(model, chunk_prompts([prompts], 9), settings_of(), story, encode=encode))
        for both, single in zip(together, alone, strict=True):
            assert both.retrieved[story] == single.retrieved[0]
            assert both.relevance[story] == pytest.approx(single.relevance[0], abs=1e-5)


# -------------------------------------------------------------------------------------------------- what is attended to


@pytest.mark.parametrize("memory", ["none", "sink", "memflow", "full"])
def test_every_pass_sees_every_frame_once(model, memory, monkeypatch):
    """Absolute frames of all dense keys and of all candidates, pass by pass, over hundreds of chunks."""
    settings = settings_of(memory=memory, steps=1, device_frames=6 if memory == "memflow" else 360, host_frames=400)
    streamer = Streamer(model, 1, settings, encode=embed_prompts)
    cache, layout = streamer.cache, streamer.cache.layout
    counts = []

    def spy(q, k, v, memory_k=None, memory_v=None, **arguments):
        if memory_k is not None:
            counts.append((k.shape[1] // layout.frame_tokens, arguments["memory_frames"].tolist()[0]))
        else:
            counts.append((k.shape[1] // layout.frame_tokens, 0))
        return torch.zeros_like(q)

    monkeypatch.setattr(attend_module, "memory_attention", spy)
    chunks = 350  # frames up to 1050: no table of 1024 to run out of
    for index in range(chunks):
        counts.clear()
        before = (cache.visible_sink(), cache.candidate_frames()[0])
        chunk = streamer.next_chunk([STORY[index // 7 % 4]])
        assert chunk.first_frame == 3 * index and torch.isfinite(chunk.frames).all()
        sink, history = before
        window = min(6, chunk.first_frame + 3)
        bank = cache.layout.bank_frames and len(chunk.candidates[0])
        dense = {"none": window, "sink": window + sink, "memflow": window, "full": window + sink + len(history)}[memory]
        assert counts[-3:] == [(dense, bank)] * 3  # two layers, the clean pass without the attention of the last
        if len(counts) > 3:  # the window re-cached: one chunk of it
            assert counts[:-3] == [(dense - 3, bank)]
        attended = chunk.candidates[0] + list(range(max(0, chunk.first_frame - 3), chunk.first_frame + 3))
        assert len(set(attended)) == len(attended)
        if memory == "memflow":
            assert chunk.candidates[0] == [*range(sink), *sorted(chunk.retrieved[0])]
            assert set(chunk.retrieved[0]) <= set(history) and len(chunk.retrieved[0]) == min(3, len(history))
        else:
            assert chunk.candidates == chunk.retrieved == chunk.activation == [[]]


def test_activation_counts_the_blocks_of_the_clean_pass(model, monkeypatch):
    seen = []

    def spy(*arguments, **options):
        seen.append(select(*arguments, **options))
        return seen[-1]

    select = activation_module.select_blocks
    monkeypatch.setattr(activation_module, "select_blocks", spy)
    for chunk in stream(
        model, chunk_prompts([STORY, OTHER], 9), settings_of(top_k=3, query_group=5), encode=embed_prompts
    ):
        for story, frames in enumerate(chunk.candidates):
            chosen = [int(block) for layer in seen for block in layer[story].flatten() if block >= 0]
            assert len(chosen) == (2 * 2 * 10 * 3 if frames else 0)  # layers, heads, groups of 5 in 48 queries, top_k
            shares = [sum(block // 4 == j for block in chosen) / len(chosen) for j in range(len(frames))]
            assert chunk.activation[story] == pytest.approx(shares)
        assert not seen or len(seen) == 2  # once per layer, in the clean pass alone
        seen.clear()


@pytest.mark.parametrize("query_group", [5, None])
@pytest.mark.parametrize("reselect", ["step", "chunk"])
def test_how_often_a_chunk_chooses(model, monkeypatch, reselect, query_group):
    """With "chunk" only in the first of three noisy passes and in the clean one, which leaves out the last layer."""
    settings = settings_of(reselect=reselect, query_group=query_group, steps=3, recache=False)
    streamer = Streamer(model, 2, settings, encode=embed_prompts, report=False)
    chosen: list[Tensor] = []
    select = registration.select_blocks
    registered = registration.memory_attention

    def spy(*arguments):
        chosen.append(select(*arguments))
        return chosen[-1]

    def composed(q, k, v, memory_k, *rest):
        out = registered(q, k, v, memory_k, *rest)
        if memory_k is not None:
            chosen.append(out[2])
        return out

    monkeypatch.setattr(registration, "select_blocks", spy)
    monkeypatch.setattr(registration, "memory_attention", composed)
    for index in range(5):
        chosen.clear()
        streamer.next_chunk([STORY[index % 4], OTHER[index % 4]])
        if index > 2:
            assert len(chosen) == {"step": 4 * 2 - 1, "chunk": 2 * 2 - 1}[reselect]
    if reselect == "chunk":  # what is kept is of the clean pass, but for the last layer, which did not choose in it
        assert torch.equal(streamer.chosen.indices[0], chosen[-1])
        assert torch.equal(streamer.chosen.indices[1], chosen[1])


def test_a_choice_that_is_kept_is_that_of_the_first_pass(model):
    prompts = chunk_prompts([STORY], 9)
    steps, chunks = (frames_of(run(model, prompts, reselect=reselect, top_k=2)) for reselect in ("step", "chunk"))
    assert torch.equal(steps[:, :, :6], chunks[:, :, :6]), "nothing to choose from yet"
    assert not torch.equal(steps, chunks)
    once = (frames_of(run(model, prompts, reselect=reselect, top_k=2, steps=1)) for reselect in ("step", "chunk"))
    torch.testing.assert_close(*once, rtol=0, atol=1e-4)


def allocated_bytes(streamer: Streamer, prompt: str) -> int:
    """All that the CPU allocator hands out while one chunk is made, transient or not."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        streamer.next_chunk([prompt])
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0)


@pytest.mark.parametrize("memory", ["none", "sink", "memflow"])
def test_a_chunk_allocates_nothing_in_proportion_to_the_cache(model, memory):
    """But room for the mean keys of one layer, which retrieval takes for all frames that there may be at once."""
    sizes, rooms = [], []
    for device_frames in (10, 2000):
        streamer = Streamer(model, 1, settings_of(memory=memory, device_frames=device_frames), encode=embed_prompts)
        for _ in range(6):
            streamer.next_chunk([STORY[0]])
        sizes.append(allocated_bytes(streamer, STORY[0]))
        layout = streamer.cache.layout
        rooms.append(device_frames * layout.kv_heads * layout.head_dim * 4 if memory == "memflow" else 0)
    sizes = [size - room for size, room in zip(sizes, rooms, strict=True)]
    assert sizes[0] > 0 and abs(sizes[1] - sizes[0]) < 0.01 * sizes[0], sizes


# ------------------------------------------------------------------------------------------------------- use and misuse


def test_chunks_come_as_they_are_made_from_prompts_without_end(model):
    asked = []

    def prompts():
        for index in itertools.count():
            asked.append(index)
            yield [STORY[index % 2]]

    chunks = stream(model, prompts(), settings_of(), encode=embed_prompts)
    assert [next(chunks).index for _ in range(3)] == [0, 1, 2]
    assert asked == [0, 1, 2]
    chunks.close()


def test_runs_under_inference_mode_and_keeps_no_graph(model):
    prompts = chunk_prompts([STORY], 9)
    with torch.inference_mode():
        inferred = run(model, prompts)
    plain = run(model, prompts)
    assert torch.equal(frames_of(inferred), frames_of(plain)) and not frames_of(plain).requires_grad
    assert torch.is_grad_enabled()


def test_half_precision_follows_float32(model):
    half = CausalVideoModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    prompts = chunk_prompts([STORY], 9)[:5]
    got, want = run(half.bfloat16(), prompts, memory="full"), run(model, prompts, memory="full")
    assert got[0].frames.dtype == torch.float32
    assert (frames_of(got) - frames_of(want)).abs().mean() < 0.05 * frames_of(want).abs().mean()


def test_what_cannot_work_is_said_before_the_first_chunk(model):
    with pytest.raises(ValueError, match="20 chunks need device_frames >= 19, got 10"):
        stream(model, [["a ball in the sea"]] * 20, settings_of(memory="full", device_frames=10), encode=embed_prompts)
    for prompts in ("a ball in the sea", ["a ball in the sea"], [[]], [[3]]):
        with pytest.raises(TypeError, match="prompts"):
            next(stream(model, prompts, settings_of(), encode=embed_prompts))
    with pytest.raises(ValueError, match="does not divide into 4 x 4 patches"):
        next(stream(model, [[STORY[0]]], settings_of(width=18), encode=embed_prompts))
    for seed in (-1, [1, 2]):
        with pytest.raises(ValueError, match="seed must be"):
            Streamer(model, 1, settings_of(), seed, encode=embed_prompts)


def test_a_bad_prompt_in_mid_stream_loses_nothing(model):
    streamer = Streamer(model, 1, settings_of(), seed=2, encode=embed_prompts)
    first = streamer.next_chunk([STORY[0]])
    with pytest.raises(ValueError, match="unknown word 'dragon'"):
        streamer.next_chunk(["a dragon in the sea"])
    with pytest.raises(ValueError, match="takes 1 prompts, one per story, got 2"):
        streamer.next_chunk([STORY[0], STORY[1]])
    second = streamer.next_chunk([STORY[0]])
    assert_same_video([first, second], run(model, [[STORY[0]]] * 2, seed=2), tolerance=0)


# ------------------------------------------------------------------------------------------------------------- controls


def test_random_blocks_are_spread_evenly_whatever_the_keys(model):
    """As many blocks as otherwise, every candidate as often as any other; the same seed makes the same choice."""
    prompts = chunk_prompts([STORY], 12)
    chunks = run(model, prompts, selection="random", top_k=2)
    shares = torch.tensor([chunk.activation[0] for chunk in chunks if len(chunk.candidates[0]) == 6])
    assert len(shares) >= 5
    assert (shares.mean(0) - 1 / 6).abs().max() < 0.06
    again = run(model, prompts, selection="random", top_k=2)
    assert [chunk.activation for chunk in again] == [chunk.activation for chunk in chunks]
    assert [chunk.activation for chunk in run(model, prompts, top_k=2)] != [chunk.activation for chunk in chunks]


def test_a_policy_of_the_caller_s_own_chooses_the_bank(model):
    class Oldest:
        def choose(self, candidates, text_keys, text_lengths):
            chosen = [frames[:2] for frames in candidates.frames]
            return Retrieved(chosen, [[1.0] * len(frames) for frames in chosen])

    streamer = Streamer(model, 1, settings_of(), encode=embed_prompts, policy=Oldest())
    for prompts in chunk_prompts([STORY], 12):
        chunk = streamer.next_chunk(prompts)
        oldest = [frame for frame in range(3, chunk.first_frame - 3, 3)][:2]
        assert chunk.retrieved[0] == oldest
