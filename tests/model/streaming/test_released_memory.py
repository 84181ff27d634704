"""memory="released" against a slow stream that keeps every frame and follows the released schedule with lists."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from memflow_ops.model.stories.prompts import chunk_prompts
from memflow_ops.model.streaming.sampler import FlowMatchSampler
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer, stream
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

SIZE, TEXT_LEN, TEXT_DIM = 8, 5, 6
STORY = ("a ball in the meadow", "a box in the sea", "an empty desert", "a ball at night")
OTHER = ("a star at night", "a star at night", "a ring in the desert", "an empty sea")


def encode(prompts: Sequence[str]) -> Tensor:
    """Any words at all: embeddings drawn from the letters, the last rows padding."""
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(F.pad(torch.randn(3, TEXT_DIM, generator=generator), (0, 0, 0, 1)))
    return torch.stack(rows)


@pytest.fixture(scope="module")
def model() -> CausalVideoModel:
    torch.manual_seed(3)
    sizes = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "in_dim": 4, "out_dim": 4}
    config = ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=TEXT_LEN, prediction="x0")
    model = CausalVideoModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name or "norm_k" in name:  # sharper attention: what is attended to matters
            parameter.data.mul_(2)
    return model


def settings_of(**changes) -> StreamSettings:
    defaults = {
        "memory": "released",
        "height": SIZE,
        "width": SIZE,
        "steps": 2,
        "shift": 7.0,
        "window_frames": 9,
        "bank_schedule": "single-prompt",
    }
    return StreamSettings(**{**defaults, **changes})


class SlowStream:
    """One story. Frames are {layer: (rotated keys, values)}, each (T, heads, head_dim); banks are per layer."""

    def __init__(self, model: CausalVideoModel, settings: StreamSettings):
        self.model, self.settings = model, settings
        self.first: list[dict] = []  # every frame as of its own clean pass: what sink and bank keep
        self.window: dict[int, dict] = {}  # re-cached ones anew
        self.banks: list[list[tuple[int, dict]]] = [[] for _ in range(model.config.num_layers)]
        self.staged: tuple[int, dict] = (-1, {})  # the frame that is to enter the banks
        self.clean: list[Tensor] = []
        self.reports: list[tuple] = []

    def update_bank(self, chunk: int, text, recached: bool) -> None:
        settings, frame = self.settings, (chunk - 1) * self.settings.chunk_frames
        interactive = settings.bank_schedule == "interactive"
        place = (chunk - 1) // settings.record_interval
        if not interactive or (chunk - 1) % settings.record_interval == 0:
            self.staged = frame, (self.first if frame < settings.sink_frames else self.window)[frame]
        for layer, bank in enumerate(self.banks):
            if place >= settings.bank_frames:
                scores = [torch.einsum("thd,shd->", text[layer][0][0], kv[layer][0]).item() for _, kv in bank]
                newest = len(bank) - 1  # which gives way at a switch, where the text keys have been emptied
                bank.pop(newest if interactive and recached else scores.index(min(scores)))
                bank.append(self.staged)
            else:
                bank[place:] = [self.staged]

    def run_window(self, text, end: int) -> None:
        """Re-caches all frames of sink and window up to `end` in one pass whose queries see all of them. The sink keeps
        its keys, unless the frames begin with it."""
        settings = self.settings
        first_frame = max(0, end - settings.sink_frames - settings.window_frames)
        x = torch.cat(self.clean, dim=2)[:, :, first_frame:end]
        sink_kept = settings.sink_frames if first_frame else 0
        _, own, _ = self.run_pass(x, 0.0, text, first_frame, [], end, sink_kept)
        for i, frame in enumerate(own[sink_kept:], first_frame + sink_kept):
            (self.first if i < settings.sink_frames else self.window)[i] = frame

    def run_pass(
        self, x: Tensor, t: float, text, first_frame: int, local: list[int], sink_end: int, unseen: int = 0
    ) -> tuple:
        """unseen: how many of its own first frames nobody attends to."""
        model, settings = self.model, self.settings
        size, grid = x.shape[2], model.grid(SIZE, SIZE)
        tokens = grid[0] * grid[1]
        own: list[dict] = [{} for _ in range(size)]
        chosen: list[tuple[int, list[int]]] = []

        def attend(layer, q, k, v):
            here = torch.arange(first_frame, first_frame + size)
            q, k = model.rotate(q, here, grid)[0], model.rotate(k, here, grid)[0]
            for i, frame in enumerate(own):
                frame[layer] = k[i * tokens : (i + 1) * tokens], v[0, i * tokens : (i + 1) * tokens]
            seen = [(first_frame + i, frame) for i, frame in enumerate(own)][unseen:]
            known = {**dict(enumerate(self.first)), **dict(seen)}
            sink = [(f, known[f]) for f in range(min(settings.sink_frames, sink_end))]
            memory = [(f, kv[layer]) for f, kv in [*sink, *self.banks[layer]]]
            near = [kv[layer] for f, kv in self.window.items() if f in local]
            near += [kv[layer] for f, kv in seen if f >= settings.sink_frames]
            out = []
            for head in range(q.shape[1]):
                if settings.top_frames is None:
                    taken = memory
                else:
                    scores = torch.stack([q[:, head].mean(0) @ k[:, head].mean(0) for _, (k, _) in memory])
                    best = scores.topk(min(settings.top_frames, len(memory))).indices.tolist()
                    taken = [memory[i] for i in best]
                    chosen.append((layer, [f for f, _ in taken]))
                keys, values = (
                    torch.cat([kv[part][:, head] for kv in [*(kv for _, kv in taken), *near]]) for part in (0, 1)
                )
                out.append(F.scaled_dot_product_attention(q[None, :, head], keys[None], values[None])[0])
            return torch.stack(out, dim=1)[None]

        y = model(x, torch.full((1, size), t), text, attend)
        return y, own, chosen

    @torch.no_grad()
    def run(self, prompts: Sequence[str], noises: Sequence[Tensor]) -> Tensor:
        settings, size, previous = self.settings, self.settings.chunk_frames, None
        sampler = FlowMatchSampler(settings.steps, settings.shift, prediction=self.model.config.prediction)
        text = None
        for chunk, (prompt, x) in enumerate(zip(prompts, noises, strict=True)):
            first_frame = chunk * size
            recached = settings.recache and previous not in (None, prompt)
            if chunk and settings.bank_frames:
                self.update_bank(chunk, text, recached)  # the last prompt's text
            text = self.model.encode_text(encode([prompt]))
            rest = range(settings.sink_frames, first_frame + size)
            local = [f for f in rest[-settings.window_frames :] if f < first_frame]
            if recached and settings.bank_schedule == "interactive":
                self.run_window(text, first_frame)
            elif recached:
                for start in sorted({f // size * size for f in local}):
                    seen = [f for f in local if f < start]
                    _, own, _ = self.run_pass(self.clean[start // size], 0.0, text, start, seen, first_frame)
                    self.window.update({start + i: own[i] for i in range(size) if start + i in local})
            for i, sigma in enumerate(sampler.sigmas[:-1]):
                y, _, _ = self.run_pass(x, 1000 * sigma, text, first_frame, local, first_frame + size)
                x = sampler.step(x, sampler.denoised(x, y, sigma), i)
            _, own, chosen = self.run_pass(x, 0.0, text, first_frame, local, first_frame + size)
            self.first += own
            self.window.update({first_frame + i: own[i] for i in range(size)})
            self.clean.append(x)
            self.reports.append(([[f for f, _ in bank] for bank in self.banks], chosen))
            previous = prompt
        return torch.cat(self.clean, dim=2)


VARIANTS = {
    "dense": {"recache": False},
    "dense-recached": {},
    "top-3": {"top_frames": 3, "recache": False},
    "top-2-recached": {"top_frames": 2, "bank_frames": 2, "record_interval": 1},
    "window-is-chunk": {"window_frames": 3, "top_frames": 1},
    "chunk-2": {"chunk_frames": 2, "sink_frames": 2, "window_frames": 6, "bank_frames": 4, "record_interval": 1},
    "no-sink-no-bank": {"sink_frames": 0, "bank_frames": 0},
    "interactive": {"bank_schedule": "interactive"},
    "interactive-bank-full": {"bank_schedule": "interactive", "record_interval": 2, "bank_frames": 2},
    "interactive-top-2": {"bank_schedule": "interactive", "top_frames": 2, "record_interval": 2, "bank_frames": 2},
    "interactive-not-recached": {"bank_schedule": "interactive", "record_interval": 2, "recache": False},
    "interactive-sink-2": {"bank_schedule": "interactive", "sink_frames": 2, "window_frames": 6, "top_frames": 2},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_against_the_slow_stream(model, changes):
    settings = settings_of(**changes)
    prompts = chunk_prompts([STORY], 10, settings.chunk_frames)
    streamer = Streamer(model, 1, settings, seed=5, encode=encode)
    noises, got = [], []
    for prompt in prompts:
        noises.append(streamer._noise()[0])
        got.append(streamer.next_chunk(prompt))
    slow = SlowStream(model, settings)
    want = slow.run([prompt for (prompt,) in prompts], noises)
    torch.testing.assert_close(torch.cat([chunk.frames for chunk in got], dim=2), want, rtol=0, atol=2e-4)
    for chunk, (banks, chosen) in zip(got, slow.reports, strict=True):
        held = {frame: sum(frame in bank for bank in banks) / len(banks) for bank in banks for frame in bank}
        assert dict(zip(chunk.retrieved[0], chunk.relevance[0], strict=True)) == held
        assert chunk.relevance[0] == sorted(chunk.relevance[0], reverse=True)
        if settings.top_frames is None:
            assert chunk.candidates == chunk.activation == [[]]
            continue
        sink = range(min(settings.sink_frames, chunk.first_frame + settings.chunk_frames))
        assert chunk.candidates[0] == sorted({*sink, *held})
        taken = [frame for _, frames in chosen for frame in frames]
        shares = [taken.count(frame) / len(taken) for frame in chunk.candidates[0]]
        assert chunk.activation[0] == pytest.approx(shares)


def test_layers_fill_their_banks_differently(model):
    """So that the test above means something."""
    streamer = Streamer(model, 1, settings_of(record_interval=1), encode=encode)
    for (prompt,) in chunk_prompts([STORY], 9):
        chunk = streamer.next_chunk([prompt])
    assert len(chunk.retrieved[0]) > 3


@pytest.mark.parametrize("top_frames", [None, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {"recache": False, "record_interval": 1},
        {"recache": True, "record_interval": 1},
        {"bank_schedule": "interactive", "record_interval": 2, "bank_frames": 2},
    ],
    ids=["not-recached", "recached", "interactive"],
)
def test_a_batch_of_two_is_two_runs(model, top_frames, changes):
    """The stories switch at different chunks."""
    changes = {"top_frames": top_frames, **changes}

    def run(stories, seed) -> list[Chunk]:
        return list(stream(model, chunk_prompts(stories, 9), settings_of(**changes), seed, encode=encode))

    together = run([STORY, OTHER], 7)
    for story, prompts in enumerate((STORY, OTHER)):
        for both, single in zip(together, run([prompts], 7 + story), strict=True):
            torch.testing.assert_close(both.frames[story], single.frames[0], rtol=0, atol=1e-4)
            assert both.retrieved[story] == single.retrieved[0]
            assert both.activation[story] == pytest.approx(single.activation[0])
    assert any(chunk.retrieved[0] != chunk.retrieved[1] for chunk in together)


@pytest.mark.parametrize("top_frames", [None, 3])
def test_half_precision_follows_float32(model, top_frames):
    half = CausalVideoModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    half = half.bfloat16()
    settings, prompts = settings_of(top_frames=top_frames, record_interval=1), chunk_prompts([STORY], 9)[:7]
    got, want = (list(stream(m, prompts, settings, 2, encode=encode)) for m in (half, model))
    for a, b in zip(got, want, strict=True):
        assert a.frames.dtype == torch.float32
        assert (a.frames - b.frames).abs().mean() < 0.1 * b.frames.abs().mean()


def test_it_is_sink_and_window_until_the_bank_adds_a_frame(model):
    """With no bank the keys are those of memory="sink", whose window of the same length gives its part to the sink."""
    prompts = chunk_prompts([STORY], 9)
    plain = list(stream(model, prompts, settings_of(bank_frames=0, recache=False), 2, encode=encode))
    sink = list(stream(model, prompts, settings_of(memory="sink", recache=False), 2, encode=encode))
    for a, b in zip(plain, sink, strict=True):
        torch.testing.assert_close(a.frames, b.frames, rtol=0, atol=1e-4)
    banked = list(stream(model, prompts, settings_of(recache=False), 2, encode=encode))
    assert torch.equal(banked[0].frames, plain[0].frames)
    assert (banked[1].frames - plain[1].frames).abs().max() > 1e-3, "frame 0 counts twice in chunk 1"
