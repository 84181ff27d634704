"""Held-out stories drawn by the renderer instead of a model, with mistakes on demand, and how they are judged."""

from collections.abc import Iterator

import torch

from memflow_ops.model.streaming.streamer import Chunk
from memflow_ops.model.toy import world
from memflow_ops.model.toy.evaluation.figures import KindFigures
from memflow_ops.model.toy.evaluation.held_out import (
    FRAMES_PER_PROMPT,
    Appearance,
    appearances,
    is_return,
    make_stories,
    named_at,
)
from memflow_ops.model.toy.evaluation.summary import judge_stream, summarise
from memflow_ops.model.toy.language import NOBODY, parse_prompt
from memflow_ops.model.toy.settings import TOY_SETTINGS

STORIES = 4


class Truth:
    """Draws stories as a perfect memory would make them, but for what a test changes."""

    def __init__(self, stories: list[list[str]], seed: int = 1):
        self.stories = stories
        generator = torch.Generator().manual_seed(seed)
        self.hue = torch.rand(len(stories), NOBODY, generator=generator)
        self.pattern = torch.randint(3, (len(stories), NOBODY), generator=generator)
        self.turn_returns = 0.0
        """degrees by which a character's hue is off whenever it is back"""
        self.other_pattern = self.other_shape = self.absent = False
        """at returns only"""
        self.retrieves_named = True
        self.alike = False
        """all characters of a story have one hue"""

    def chunks(self) -> Iterator[Chunk]:
        back = {(it.story, it.prompt, it.character) for it in appearances(self.stories) if it.first is not None}
        for index in range(len(self.stories[0]) * FRAMES_PER_PROMPT // 3):
            prompt, part = divmod(index * 3, FRAMES_PER_PROMPT)
            frames, retrieved = [], []
            for story, prompts in enumerate(self.stories):
                scene = parse_prompt(prompts[prompt])
                who, hue, pattern, x = [], [], [], []
                for side, character in enumerate(scene.who):
                    returns = (story, prompt, character) in back
                    if returns and self.absent:
                        continue
                    who.append((character + (returns and self.other_shape)) % NOBODY)
                    hue.append(self.hue[story, 0 if self.alike else character] + returns * self.turn_returns / 360)
                    pattern.append((self.pattern[story, character] + (returns and self.other_pattern)) % 3)
                    x.append((world.LEFT, world.RIGHT)[side] if len(scene.who) == 2 else world.MIDDLE)
                if part in (3, 6):
                    who = hue = pattern = x = []  # chunks that nobody looks at
                centre = torch.tensor([[at, 0.5] for at in x]).view(-1, 2)
                whom, tones = (torch.tensor(of, dtype=torch.long) for of in (who, pattern))
                frames.append(world.render(whom, torch.tensor(scene.place), torch.tensor(hue) % 1, tones, centre))
                past = range(0, 3 * index - 3, 3)
                shown = [f for f in past if bool(set(named_at(prompts, f)) & set(scene.who)) == self.retrieves_named]
                retrieved.append(shown[-3:])
            video = torch.stack(frames)[:, :, None].expand(-1, -1, 3, -1, -1)
            empty: list[list[float]] = [[] for _ in self.stories]
            spoken = [prompts[prompt] for prompts in self.stories]
            candidates = [[0, 1, 2, *found] for found in retrieved]
            yield Chunk(index, 3 * index, spoken, video, retrieved, empty, candidates, empty, 0.5)


def judged(**changes: object) -> KindFigures:
    streamed = []
    for i, stories in enumerate(make_stories(STORIES, 10_000)[:2]):
        truth = Truth(stories, seed=i)
        for name, value in changes.items():
            setattr(truth, name, value)
        streamed.append(judge_stream(stories, truth.chunks(), 3))
    return summarise("memflow", streamed, TOY_SETTINGS, blocks_per_frame=4)


def returns() -> list[Appearance]:
    return [it for stories in make_stories(STORIES, 10_000)[:2] for it in appearances(stories) if is_return(it)]
