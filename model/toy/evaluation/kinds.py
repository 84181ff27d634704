"""The kinds of memory that the evaluation compares, controls included."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import Tensor

from memflow_ops.cache.policies import Retrieved
from memflow_ops.cache.views import Candidates
from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.toy.evaluation.held_out import FRAMES_PER_PROMPT, named_at
from memflow_ops.model.toy.language import embed_prompts, parse_prompt
from memflow_ops.model.wan.transformer import CausalVideoModel


@dataclass(frozen=True)
class MemoryKind:
    """One kind of memory to be judged."""

    about: str
    """what a chunk sees, in words"""
    change: Callable[[StreamSettings], StreamSettings]
    """makes the settings of this kind from those of the evaluation"""
    oracle: bool = False
    """whether `OraclePolicy` retrieves"""


MEMORY_KINDS = {
    "none": MemoryKind("the local window alone", lambda s: replace(s, memory="none")),
    "sink": MemoryKind("and the first frames", lambda s: replace(s, memory="sink")),
    "full": MemoryKind("and the whole history, dense", lambda s: replace(s, memory="full")),
    "memflow": MemoryKind("retrieved frames, top-k blocks", lambda s: s),
    "random frames": MemoryKind("frames at random, top-k blocks", lambda s: replace(s, relevance="random")),
    "random blocks": MemoryKind("retrieved frames, blocks at random", lambda s: replace(s, selection="random")),
    "dense bank": MemoryKind("retrieved frames, all blocks", lambda s: replace(s, top_k=10_000)),
    "oracle frames": MemoryKind("the right frames by name, top-k blocks", lambda s: s, oracle=True),
}


class OraclePolicy:
    """A control that retrieves frames which show whom the coming prompt names.

    It goes by what the prompts said when the frames were made, not by the frames. `coming`, the coming prompt of every
    story, is set before each chunk. The named characters take turns, each with its frames spread over the past.
    """

    def __init__(self, bank_frames: int, stories: Sequence[Sequence[str]]):
        self.bank_frames, self.stories = bank_frames, stories
        self.coming: Sequence[str] = ()

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        chosen = []
        for story, prompt, frames in zip(self.stories, self.coming, candidates.frames, strict=True):
            queues = [
                [frame for frame in frames if character in named_at(story, frame)]
                for character in parse_prompt(prompt).who
            ]
            spread = [queue[:: max(1, len(queue) // self.bank_frames)] for queue in queues]
            turns = chain.from_iterable(zip(*(_padded(queue, self.bank_frames) for queue in spread), strict=True))
            chosen.append(list(dict.fromkeys(frame for frame in turns if frame is not None))[: self.bank_frames])
        return Retrieved(chosen, [[0.0] * len(frames) for frames in chosen])


def _padded(queue: list[int], length: int) -> list[int | None]:
    return [*queue[:length], *[None] * (length - len(queue))]


def stream_kind(
    model: CausalVideoModel, stories: list[list[str]], kind: MemoryKind, settings: StreamSettings, seed: int
) -> Iterator[Chunk]:
    """Chunk after chunk of all stories together, under one kind of memory. The stories have the same length."""
    prompts_by_chunk = chunk_prompts(stories, FRAMES_PER_PROMPT, settings.chunk_frames)
    # Nothing may be forgotten, because retrieval from the whole past is judged.
    room = max(settings.device_frames, len(prompts_by_chunk))
    settings = kind.change(replace(settings, device_frames=room))
    oracle = OraclePolicy(settings.bank_frames, stories) if kind.oracle else None
    streamer = Streamer(model, len(stories), settings, seed, encode=embed_prompts, policy=oracle)
    for prompts in prompts_by_chunk:
        if oracle is not None:
            oracle.coming = prompts
        yield streamer.next_chunk(prompts)
