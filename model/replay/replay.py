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
from memflow_ops.model.replay.files import FixtureError
from memflow_ops.model.replay.fixture import Call, Fixture
from memflow_ops.rotary import rope_rotation

TOLERANCE = 1e-4
"""On values that reach 10. An independent replay of the recording differed by 8.6e-6."""
ORDER_TOLERANCE = 1e-4
"""Frames whose scores differ by less than this share of sum(|q||k|) may be ranked in either order."""


@dataclass(frozen=True)
class ComparedCall:
    """A recorded call and how our model's result agrees with it."""

    call: Call
    difference: float
    """The largest difference, of the sampled outputs and of the mean and standard deviation of all outputs."""
    choices: int
    """How many top-k choices were compared."""
    wrong: list[str]
    """A line for each choice that does not agree."""

    @property
    def agrees(self) -> bool:
        return self.difference < TOLERANCE and not self.wrong  # False for a NaN


@torch.no_grad()
def replay(fixture: Fixture, mode: str) -> Iterator[ComparedCall]:
    """Runs the calls of one mode in order and compares each with the recording."""
    model = fixture.model
    config = model.config
    cache = ReleasedCache(_layout(fixture))
    banks: list[list[int]] = [[] for _ in range(config.num_layers)]  # frame per place, by the recorded choices
    top_frames = fixture.top_frames if mode == "sma" else None
    selection = None if top_frames is None else BlockSelection(top_frames, query_group=None)
    rows, columns = (torch.arange(n, dtype=torch.long, device="cpu") for n in fixture.grid)
    text, noise = model.encode_text(fixture.context), fixture.noise()
    for chunk in range(fixture.chunks(mode)):
        # With the text keys of the last chunk: at a switch they are still those of the old prompt.
        cache.update_bank([keys for keys, _ in text])
        if chunk == fixture.switch_chunk:
            text = model.encode_text(fixture.context_after_switch)
        first_frame = cache.begin_chunk()
        frames = torch.arange(first_frame, first_frame + fixture.frames_per_chunk, dtype=torch.long, device="cpu")
        rotation = rope_rotation(config.head_dim, frames, rows, columns)
        x = next(noise)
        for step, timestep in enumerate(fixture.timesteps):
            call, wrong = fixture.call(mode, chunk, step), []
            if chunk and step == 0:
                wrong += _advance_banks(fixture, call, banks, cache)
            activation = _Activation(cache, top_frames)
            last = step == len(fixture.timesteps) - 1
            attend = attend_to_memory(cache, rotation, selection, remember=last, observe=activation.observe)
            y = model(x, torch.full((1, len(frames)), timestep, dtype=torch.float32, device="cpu"), text, attend)
            x = x - 0.25 * y
            wrong += activation.wrong(call, banks)
            yield ComparedCall(call, _difference(y, call), len(call.kept or ()) + sum(map(len, call.activated)), wrong)
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
        schedule="single-prompt",
    )


def _difference(y: Tensor, call: Call) -> float:
    differences = torch.stack([(y[0, :, :, ::6, ::8] - call.out).abs().max(), y.mean() - call.mean, y.std() - call.std])
    return differences.abs().max().item()  # a NaN among them gives NaN


def _advance_banks(fixture: Fixture, call: Call, banks: list[list[int]], cache: ReleasedCache) -> list[str]:
    """Turns the recording's banks of the last chunk into those of this chunk. Returns a line for each layer in which
    our cache chose other frames."""
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
        wrong += _disagreement(f"layer {layer}, bank", bank, frames, dict(zip(frames, scores, strict=True)), scale)
        bank.append(staged)
    return wrong


class _Activation:
    """The frames of sink and bank that the heads of every layer attend to in one call."""

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
        """A line for each recorded choice that differs from ours. banks: those of the recording."""
        lines = []
        candidates = [of_layer[0] for of_layer in self.cache.bank_by_layer()]
        sink = list(range(len(candidates[0]) - len(banks[0])))
        for layer, (heads, (chosen, scores, scales)) in enumerate(zip(call.activated, self.seen, strict=True)):
            for head, recorded in enumerate(heads):
                ours, score = candidates[layer], scores[head].tolist()
                best_first = sorted((i for i in chosen[head].tolist() if i >= 0), key=lambda i: -score[i])
                lines += _disagreement(
                    f"layer {layer}, head {head}",
                    [(sink + banks[layer])[i] for i in recorded],
                    [ours[i] for i in best_first],
                    dict(zip(ours, score, strict=True)),
                    scales[head].item(),
                )
        return lines


def _disagreement(
    name: str, recorded: Sequence[int], ours: Sequence[int], scores: dict[int, float], scale: float
) -> list[str]:
    """A line unless both are the same frames, in an order that our scores allow."""
    if sorted(recorded) == sorted(ours):
        ranked = [scores[frame] for frame in recorded]
        if all(b - a <= ORDER_TOLERANCE * scale for a, b in itertools.pairwise(ranked)):
            return []
    return [f"{name}: recorded frames {list(recorded)}, ours {list(ours)}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Replays the fixture that the command line names and prints a line per call. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m memflow_ops.model.replay", description=__doc__.split("\n\n")[2])
    parser.add_argument("tensors", type=Path, metavar="FIXTURE.safetensors")
    parser.add_argument("description", type=Path, metavar="FIXTURE.json")
    given = parser.parse_args(arguments)
    torch.set_float32_matmul_precision("highest")
    compared: list[ComparedCall] = []
    try:
        fixture = Fixture(given.tensors, given.description)
        print("mode   chunk  step  timestep  max |difference|  top-k choices")
        for mode in fixture.modes:
            for result in replay(fixture, mode):
                compared.append(result)
                print(_line(result), flush=True)
    except FixtureError as error:
        print(f"released: {error}", file=sys.stderr)
        return 2
    good = all(result.agrees for result in compared)
    wrong = sum(len(result.wrong) for result in compared)
    choices = sum(result.choices for result in compared)
    print(
        f"{len(compared)} calls, {'all agree' if good else f'{sum(not o.agrees for o in compared)} do not agree'}: "
        f"largest difference {_largest(compared):.2e} (limit {TOLERANCE:.0e}), "
        f"{choices - wrong} of {choices} top-k choices the same"
    )
    return 0 if good else 1


def _line(result: ComparedCall) -> str:
    call = result.call
    choices = "-" if not result.choices else f"{result.choices - len(result.wrong)} of {result.choices} agree"
    mark = "" if result.agrees else "   <- differs"
    line = f"{call.mode:<5}{call.chunk:>7}{call.step:>6}{call.timestep:>10g}{result.difference:>18.2e}  {choices}{mark}"
    return "\n".join([line, *(f"      {wrong}" for wrong in result.wrong)])


def _largest(compared: Sequence[ComparedCall]) -> float:
    """The largest difference of all; a NaN if there is one."""
    return torch.tensor([result.difference for result in compared], dtype=torch.float32, device="cpu").max().item()
