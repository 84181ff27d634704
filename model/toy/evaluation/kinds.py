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
from memflow_ops.model.toy.evaluation.figures import Story
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
)
from memflow_ops.model.toy.language import embed_prompts, parse_prompt
from memflow_ops.model.wan.transformer import CausalVideoModel

# ----------------------------------------------------------------------------------------------------------------- rows


class OraclePolicy:
    """A control: frames that show whom the coming prompt names, by what the prompts said when they were made.

    `coming` is set before each chunk. Who is named takes turns, each with its frames spread over the past.
    """

    def __init__(self, bank_frames: int, stories: Sequence[Sequence[str]]):
        self.bank_frames, self.stories = bank_frames, stories
        self.coming: Sequence[str] = ()

    def choose(self, candidates: Candidates, text_keys: Sequence[Tensor], text_lengths: Tensor) -> Retrieved:
        chosen = []
        for story, prompt, frames in zip(self.stories, self.coming, candidates.frames, strict=True):
            queues = [
                [frame for frame in frames if character in shown_at(story, frame)]
                for character in parse_prompt(prompt).who
            ]
            spread = [queue[:: max(1, len(queue) // self.bank_frames)] for queue in queues]
            turns = chain.from_iterable(zip(*(_padded(queue, self.bank_frames) for queue in spread), strict=True))
            chosen.append(list(dict.fromkeys(frame for frame in turns if frame is not None))[: self.bank_frames])
        return Retrieved(chosen, [[0.0] * len(frames) for frames in chosen])


def _padded(queue: list[int], length: int) -> list[int | None]:
    return [*queue[:length], *[None] * (length - len(queue))]


def shown_at(story: Sequence[str], frame: int) -> tuple[int, ...]:
    """Whom the story's prompt named at that frame."""
    return parse_prompt(story[frame // FRAMES_PER_PROMPT]).who


@dataclass(frozen=True)
class MemoryKind:
    """One kind of memory to be judged."""

    about: str
    change: Callable[[StreamSettings], StreamSettings]
    oracle: bool = False


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


def stream_kind(
    model: CausalVideoModel, stories: list[Story], kind: MemoryKind, settings: StreamSettings, seed: int
) -> Iterator[Chunk]:
    """Chunk after chunk of all stories, which have the same length, as `kind` remembers."""
    spoken = chunk_prompts(stories, FRAMES_PER_PROMPT, settings.chunk_frames)
    # Nothing is to be forgotten: what is judged is retrieval from the whole past.
    settings = kind.change(replace(settings, device_frames=max(settings.device_frames, len(spoken))))
    oracle = OraclePolicy(settings.bank_frames, stories) if kind.oracle else None
    streamer = Streamer(model, len(stories), settings, seed, encode=embed_prompts, policy=oracle)
    for prompts in spoken:
        if oracle is not None:
            oracle.coming = prompts
        yield streamer.next_chunk(prompts)
