"""Replays recorded outputs of the released MemFlow (arXiv 2512.14699) through our model, cache and ops.

    python -m memflow_ops.model.replay FIXTURE.safetensors FIXTURE.json

A fixture holds weights in the original Wan 2.1 layout, text embeddings, and what the authors' code made of them, chunk
by chunk, without (`dense`) and with (`sma`) sparse memory activation. Prints the largest absolute difference of every
call and whether its top-k choices agree, as frames. Exit code 0 only if every difference is below 1e-4 in float32 and
every choice agrees; 1 if not; 2 if the fixture cannot be replayed.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from memflow_ops import select_blocks
from memflow_ops.cache.attend import BlockSelection, attend_to_memory
from memflow_ops.cache.released_cache import ReleasedCache
from memflow_ops.cache.released_layout import ReleasedLayout
from memflow_ops.cache.views import Memory
from memflow_ops.model.replay.fixture import Call, Fixture, FixtureError
from memflow_ops.rotary import rope_rotation

TOLERANCE = 1e-4
"""On values that reach 10; an independent script came to 8.6e-6."""
ORDER_TOLERANCE = 1e-4
"""Frames whose scores differ by less than this share of sum |q||k| may stand in either order."""


@dataclass(frozen=True)
class Outcome:
    """How one call compares."""

    call: Call
    difference: float
    """the largest, of the recorded sample of outputs and of the mean and standard deviation of all of them"""
    choices: int
    wrong: list[str]
    """a line for each choice that does not agree"""

    @property
    def agrees(self) -> bool:
        return self.difference < TOLERANCE and not self.wrong  # a NaN does not agree


@torch.no_grad()
def replay(fixture: Fixture, mode: str) -> Iterator[Outcome]:
    """Makes the calls of one mode in order and compares each with the recording."""
    model = fixture.model
    config = model.config
    cache = ReleasedCache(_layout(fixture))
    banks: list[list[int]] = [[] for _ in range(config.num_layers)]  # frame per slot, as the recording's choices say
    top_frames = fixture.top_frames if mode == "sma" else None
    selection = None if top_frames is None else BlockSelection(top_frames, query_group=None)
    rows, columns = (torch.arange(n) for n in fixture.grid)
    text, noise = model.encode_text(fixture.context), fixture.noise()
    for chunk in range(fixture.chunks(mode)):
        # With the text keys of the call before: at a switch, still the old prompt's.
        cache.update_bank([keys for keys, _ in text])
        if chunk == fixture.switch_chunk:
            text = model.encode_text(fixture.context_after_switch)
        first_frame = cache.begin_chunk()
        frames = torch.arange(first_frame, first_frame + fixture.frames_per_chunk)
        rotation = rope_rotation(config.head_dim, frames, rows, columns)
        x = next(noise)
        for step, timestep in enumerate(fixture.timesteps):
            call, wrong = fixture.call(mode, chunk, step), []
            if chunk and step == 0:
                wrong += _advance_banks(fixture, call, banks, cache)
            activation = _Activation(cache, top_frames)
            attend = attend_to_memory(cache, rotation, selection, observe=activation.observe)
            y = model(x, torch.full((1, len(frames)), timestep), text, attend)
            x = x - 0.25 * y
            wrong += activation.wrong(call, banks)
            yield Outcome(call, _difference(y, call), len(call.kept or ()) + sum(map(len, call.activated)), wrong)
        cache.commit()


def _layout(fixture: Fixture) -> ReleasedLayout:
    config = fixture.model.config
    return ReleasedLayout(
        config.num_layers,
        1,
        fixture.tokens_per_frame,
        config.num_heads,
        config.head_dim,
        fixture.frames_per_chunk,
        fixture.window_size,
        fixture.sink_size,
        fixture.bank_size,
        record_interval=fixture.record_interval,
    )


def _difference(y: Tensor, call: Call) -> float:
    differences = torch.stack([(y[0, :, :, ::6, ::8] - call.out).abs().max(), y.mean() - call.mean, y.std() - call.std])
    return differences.abs().max().item()  # NaN if any is


def _advance_banks(fixture: Fixture, call: Call, banks: list[list[int]], cache: ReleasedCache) -> list[str]:
    """The recording's banks for this chunk, from those of the last; returns where our choice is another."""
    if not fixture.bank_size:
        return []
    staged = (call.chunk - 1) * fixture.frames_per_chunk
    wrong = []
    for layer, bank in enumerate(banks):
        if call.kept is None:
            bank[(call.chunk - 1) // fixture.record_interval :] = [staged]
            continue
        bank[:] = [bank[slot] for slot in call.kept[layer]]
        assert cache.kept is not None
        frames, scores = (of[layer, 0].tolist() for of in cache.kept[:2])
        scale = cache.kept.scales[layer, 0].item()
        wrong += _compared(f"layer {layer}, bank", bank, frames, dict(zip(frames, scores, strict=True)), scale)
        bank.append(staged)
    return wrong


class _Activation:
    """What the heads of every layer take of sink and bank in one call."""

    def __init__(self, cache: ReleasedCache, top_frames: int | None):
        self.cache, self.top_frames = cache, top_frames
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def observe(self, layer: int, q: Tensor, memory: Memory) -> None:
        slots = memory.slots[0, : int(memory.frames)].long()
        means, query = memory.descriptors[0, slots], q[0].mean(0)  # (frames, H, D), (H, D)
        scores = torch.einsum("hd,nhd->hn", query, means)
        scale = torch.einsum("hd,nhd->hn", query.abs(), means.abs())
        chosen = select_blocks(
            q,
            memory.descriptors,
            self.top_frames or 1,
            query_group=None,
            memory_frames=memory.frames,
            memory_slots=memory.slots,
            blocks_per_frame=1,
        )
        self.seen.append((chosen[0, :, 0], scores, scale.amax(1)))

    def wrong(self, call: Call, banks: list[list[int]]) -> list[str]:
        """Where the recorded choices, over the recording's banks, are others."""
        lines = []
        candidates = [of_layer[0] for of_layer in self.cache.bank_by_layer()]
        sink = list(range(len(candidates[0]) - len(banks[0])))
        for layer, (heads, (chosen, scores, scales)) in enumerate(zip(call.activated, self.seen, strict=True)):
            for head, recorded in enumerate(heads):
                ours, score = candidates[layer], scores[head].tolist()
                best_first = sorted((i for i in chosen[head].tolist() if i >= 0), key=lambda i: -score[i])
                lines += _compared(
                    f"layer {layer}, head {head}",
                    [(sink + banks[layer])[i] for i in recorded],
                    [ours[i] for i in best_first],
                    dict(zip(ours, score, strict=True)),
                    scales[head].item(),
                )
        return lines


def _compared(
    name: str, recorded: Sequence[int], ours: Sequence[int], scores: dict[int, float], scale: float
) -> list[str]:
    """A line unless both are the same frames, in an order that our scores allow."""
    if sorted(recorded) == sorted(ours):
        ranked = [scores[frame] for frame in recorded]
        if all(b - a <= ORDER_TOLERANCE * scale for a, b in itertools.pairwise(ranked)):
            return []
    return [f"{name}: recorded frames {list(recorded)}, ours {list(ours)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays the fixture that the command line names and prints a line per call; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m memflow_ops.model.replay", description=__doc__.split("\n\n")[2])
    parser.add_argument("tensors", type=Path, metavar="FIXTURE.safetensors")
    parser.add_argument("description", type=Path, metavar="FIXTURE.json")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    outcomes: list[Outcome] = []
    try:
        fixture = Fixture(given.tensors, given.description)
        print("mode   chunk  step  timestep  max |difference|  top-k choices")
        for mode in fixture.modes:
            for outcome in replay(fixture, mode):
                outcomes.append(outcome)
                print(_line(outcome), flush=True)
    except FixtureError as error:
        print(f"released: {error}", file=sys.stderr)
        return 2
    good = all(outcome.agrees for outcome in outcomes)
    wrong = sum(len(outcome.wrong) for outcome in outcomes)
    choices = sum(outcome.choices for outcome in outcomes)
    print(
        f"{len(outcomes)} calls, {'all agree' if good else f'{sum(not o.agrees for o in outcomes)} do not agree'}: "
        f"largest difference {_largest(outcomes):.2e} (limit {TOLERANCE:.0e}), "
        f"{choices - wrong} of {choices} top-k choices the same"
    )
    return 0 if good else 1


def _line(outcome: Outcome) -> str:
    call = outcome.call
    choices = "-" if not outcome.choices else f"{outcome.choices - len(outcome.wrong)} of {outcome.choices} agree"
    mark = "" if outcome.agrees else "   <- differs"
    line = (
        f"{call.mode:<5}{call.chunk:>7}{call.step:>6}{call.timestep:>10g}{outcome.difference:>18.2e}  {choices}{mark}"
    )
    return "\n".join([line, *(f"      {wrong}" for wrong in outcome.wrong)])


def _largest(outcomes: Sequence[Outcome]) -> float:
    """NaN counts as the largest."""
    return torch.tensor([outcome.difference for outcome in outcomes]).max().item()
