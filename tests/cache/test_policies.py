"""Retrieval: the planted frame is found, near-copies are passed over, padding and other stories do not matter."""

import pytest
import torch
import torch.nn.functional as F

from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Coverage, Random, Relevance
from memflow_ops.cache.views import Candidates

LAYERS, TOKENS, HEADS, HEAD_DIM = 2, 6, 2, 8


def lengths(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def random_candidates(stories: int, frames: int, blocks: tuple[int, ...] = (TOKENS,)) -> Candidates:
    means = torch.randn(LAYERS, stories, frames, len(blocks), HEADS, HEAD_DIM)
    return Candidates([[3 * i + 3 for i in range(frames)] for _ in range(stories)], means, blocks)


def text_keys(stories: int, tokens: int = 4) -> list[torch.Tensor]:
    return [torch.randn(stories, tokens, HEADS, HEAD_DIM) for _ in range(LAYERS)]


def slow_scores(candidates: Candidates, keys: list[torch.Tensor], valid: list[int], score: str) -> torch.Tensor:
    """The scores by their definition, story by story and token by token, in float64."""
    out = torch.zeros(len(valid), len(candidates.frames[0]), dtype=torch.float64)
    weights = torch.tensor(candidates.lengths, dtype=torch.float64)
    for layer in range(LAYERS):
        for story, count in enumerate(valid):
            means = candidates.means[layer, story].double()  # (F, n, H, D)
            for token in keys[layer][story, :count].double():
                for head in range(HEADS):
                    products = means[:, :, head] @ token[head] / HEAD_DIM**0.5  # (F, n)
                    if score == "linear":
                        part = (products * weights).sum(1) / weights.sum()
                    else:
                        mass = products.exp() * weights
                        part = mass.sum(1) / mass.sum()
                    out[story] += part / (LAYERS * count * HEADS)
    return out


@pytest.mark.parametrize("score", ["linear", "softmax"])
@pytest.mark.parametrize("blocks", [(6,), (4, 2)], ids=["frame-means", "ragged-block-means"])
def test_choice_and_scores_follow_the_definition(score, blocks):
    torch.manual_seed(0)
    candidates, keys, valid = random_candidates(3, 12, blocks), text_keys(3), [4, 2, 1]
    retrieved = Relevance(5, score).choose(candidates, keys, lengths(*valid))
    expected = slow_scores(candidates, keys, valid, score)
    for story in range(3):
        best = expected[story].argsort(descending=True)[:5]
        assert retrieved.frames[story] == [candidates.frames[story][i] for i in best]
        torch.testing.assert_close(torch.tensor(retrieved.scores[story]).double(), expected[story][best])


@pytest.mark.parametrize("score", ["linear", "softmax"])
def test_padding_takes_no_part(score):
    torch.manual_seed(0)
    candidates, keys = random_candidates(2, 20), text_keys(2, tokens=3)
    policy = Relevance(3, score, redundancy=0.9)
    want = policy.choose(candidates, keys, lengths(3, 2))
    padded = [torch.cat([k, 100 * torch.randn(2, 5, HEADS, HEAD_DIM)], dim=1) for k in keys]
    for k in padded:
        k[1, 2] = torch.nan
    assert policy.choose(candidates, padded, lengths(3, 2)).frames == want.frames


def test_fewer_candidates_than_places():
    torch.manual_seed(0)
    retrieved = Relevance(5, redundancy=0.0).choose(random_candidates(2, 2), text_keys(2), lengths(4, 4))
    assert [sorted(frames) for frames in retrieved.frames] == [[3, 6], [3, 6]]


def planted(score_of: list[float], direction_of: list[int]) -> tuple[Candidates, list[torch.Tensor]]:
    """Makes frames whose mean keys have a given relevance and, apart from that, point in given directions."""
    torch.manual_seed(0)
    text = F.normalize(torch.randn(HEADS, HEAD_DIM).flatten(), dim=0)
    others = torch.randn(max(direction_of) + 1, HEADS * HEAD_DIM)
    others = F.normalize(others - (others @ text)[:, None] * text, dim=-1)
    means = torch.stack([s * text + 20 * others[d] for s, d in zip(score_of, direction_of, strict=True)])
    means = means.view(1, 1, -1, 1, HEADS, HEAD_DIM).expand(LAYERS, -1, -1, -1, -1, -1)
    candidates = Candidates([list(range(len(score_of)))], means, (TOKENS,))
    return candidates, [text.view(1, 1, HEADS, HEAD_DIM)] * LAYERS


def test_redundancy_removal_takes_a_different_frame():
    candidates, keys = planted([5.0, 4.9, 4.8, 3.0, 2.0], [0, 0, 0, 1, 2])
    one = lengths(1)
    assert Relevance(3).choose(candidates, keys, one).frames == [[0, 1, 2]]
    assert Relevance(3, redundancy=0.95).choose(candidates, keys, one).frames == [[0, 3, 4]]
    weights = torch.tensor(candidates.lengths) / sum(candidates.lengths)
    mean_keys = torch.einsum("lfnhd,n->flhd", candidates.means[:, 0], weights).flatten(1)
    cosines = torch.nn.functional.cosine_similarity(mean_keys[:, None], mean_keys[None], dim=-1)
    assert cosines[0, 1] > 0.95 > cosines[0, 3]


def test_redundant_frames_fill_the_bank_when_nothing_else_is_left():
    candidates, keys = planted([5.0, 4.9, 4.8, 3.0], [0, 0, 0, 1])
    assert Relevance(4, redundancy=0.95).choose(candidates, keys, lengths(1)).frames == [[0, 3, 1, 2]]


def test_a_broken_frame_ranks_last():
    torch.manual_seed(0)
    candidates = random_candidates(1, 4)
    candidates.means[:, :, 1] = torch.nan
    frames = Relevance(4).choose(candidates, text_keys(1), lengths(4)).frames[0]
    assert sorted(frames) == [3, 6, 9, 12] and frames[-1] == 6


def test_planted_frame_is_found_in_all_of_the_past_and_comes_back_from_host():
    """Story 0 seeks what frame 12 showed, story 1 frame 30, long after both left the device."""
    torch.manual_seed(0)
    layout = CacheLayout(
        LAYERS, 2, TOKENS, HEADS, HEAD_DIM, bank_frames=2, device_frames=4, host_frames=200, block_size=4
    )
    cache = FrameCache(layout)
    sought = torch.randn(2, LAYERS, HEADS, HEAD_DIM)
    written = {}
    for _ in range(60):
        first_frame = cache.begin_chunk()
        for layer in range(LAYERS):
            k, v, plain = torch.randn(3, 2, layout.chunk_tokens, HEADS, HEAD_DIM).unbind(0)
            for story, frame in ((0, 12), (1, 30)):
                if first_frame == frame:
                    plain[story] += 2 * sought[story, layer]
                    written[story, layer] = k[story, :TOKENS], v[story, :TOKENS]
            cache.write(layer, k, v)
            cache.remember(layer, plain)
        cache.commit()
    keys = [sought[:, None, layer] for layer in range(LAYERS)]
    retrieved = Relevance(2).choose(cache.candidates(), keys, lengths(1, 1))
    assert [frames[0] for frames in retrieved.frames] == [12, 30]
    assert all(p.slot is None for story, f in ((0, 12), (1, 30)) for p in [cache._stories[story].history[f]])
    cache.set_bank(retrieved.frames)
    cache.begin_chunk()
    for story, frame in ((0, 12), (1, 30)):
        j = cache.bank()[story].index(frame)
        for layer in range(LAYERS):
            memory = cache.memory(layer)
            place = int(memory.slots[story, j])
            tokens = slice(place * TOKENS, (place + 1) * TOKENS)
            assert torch.equal(memory.keys[story, tokens], written[story, layer][0])
            assert torch.equal(memory.values[story, tokens], written[story, layer][1])


def told_apart(words: list[list[float]]) -> tuple[Candidates, list[torch.Tensor]]:
    """Candidates of which frame f scores words[w][f] for word w: one layer, one head, and a channel for each word."""
    scores = torch.tensor(words)
    count, frames = scores.shape
    means = torch.zeros(1, 1, frames, 1, 1, count)
    means[0, 0, :, 0, 0] = scores.T * count**0.5
    keys = torch.eye(count).view(1, count, 1, count)
    return Candidates([list(range(10, 10 + frames))], means, (TOKENS,)), [keys]


def test_coverage_answers_every_word():
    """Each word has frames of its own; by the mean over words, the best frames are all those of the first word."""
    candidates, keys = told_apart([[9, 9, 9, 0, 0, 0], [0, 0, 0, 0, 6, 0]])
    chosen = Coverage(2).choose(candidates, keys, lengths(2)).frames[0]
    assert set(chosen) & {10, 11, 12} and 14 in chosen
    assert set(Relevance(2).choose(candidates, keys, lengths(2)).frames[0]) <= {10, 11, 12}
    three = Coverage(3).choose(candidates, keys, lengths(2)).frames[0]
    assert 14 in three and len(set(three)) == 3


def test_coverage_takes_all_of_a_single_word_s_frames_first():
    """A word that prefers no frame, such as that of a place, takes no frame from a word that has frames."""
    candidates, keys = told_apart([[0.1, 0, 0, 0.1, 0, 0, 0.2, 0], [0, 9, 0, 0, 9, 0, 0, 9]])
    assert set(Coverage(3).choose(candidates, keys, lengths(2)).frames[0]) == {11, 14, 17}


def test_coverage_by_brute_force():
    """Every frame in turn is one with the largest gain, worked out by the definition."""
    candidates, keys = random_candidates(2, 9), text_keys(2)
    valid = [4, 2]
    got = Coverage(4).choose(candidates, keys, lengths(*valid))
    for story in range(2):
        shares = []
        for word in range(valid[story]):
            logits = []
            for frame in range(9):
                total = 0.0
                for layer, of_layer in enumerate(keys):
                    heads = of_layer.shape[2]
                    mean = candidates.means[layer, story, frame].double().mean(0)  # (Hkv, D)
                    for head in range(heads):
                        key_head = head * mean.shape[0] // heads
                        query = of_layer[story, word, head].double()
                        total += (query @ mean[key_head]).item() / heads / mean.shape[1] ** 0.5
                logits.append(total)
            shares.append(torch.tensor(logits).double().softmax(0))
        gathered, taken = [0.0] * len(shares), []
        for frame in got.frames[story]:
            index = candidates.frames[story].index(frame)
            gains = [
                sum((g + s[f].item()) ** 0.5 - g**0.5 for g, s in zip(gathered, shares, strict=True)) for f in range(9)
            ]
            best = max(gain for f, gain in enumerate(gains) if f not in taken)
            assert gains[index] == pytest.approx(best, abs=1e-6)
            taken.append(index)
            gathered = [g + s[index].item() for g, s in zip(gathered, shares, strict=True)]


def test_random_is_seeded_per_story_and_spread_over_the_past():
    candidates, keys = random_candidates(2, 10), text_keys(2)
    together = Random(3, [5, 9]).choose(candidates, keys, lengths(4, 4))
    alone = Candidates(candidates.frames[1:], candidates.means[:, 1:], candidates.lengths)
    assert Random(3, [9]).choose(alone, keys, lengths(4)).frames == together.frames[1:]
    seen = {f for seed in range(200) for f in Random(3, [seed]).choose(alone, keys, lengths(4)).frames[0]}
    assert seen == set(candidates.frames[0])
    assert all(len(set(frames)) == 3 for frames in together.frames)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bank_frames": 0}, "bank_frames must be positive, got 0"),
        ({"bank_frames": 3, "score": "cosine"}, "'linear' or 'softmax', got 'cosine'"),
        ({"bank_frames": 3, "redundancy": 1.5}, "redundancy is a cosine, -1 to 1, or None, got 1.5"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Relevance(**arguments)
