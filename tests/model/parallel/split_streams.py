"""Streams of a small random model, in one process or dealt out to several; a test compares what they make."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from memflow_ops.model.parallel.state import whole_state
from memflow_ops.model.streaming.settings import StreamSettings
from memflow_ops.model.streaming.streamer import Chunk, Streamer
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig

HEADS, LAYERS, CHUNKS = 4, 2, 7
TEXT_LEN, TEXT_DIM = 3, 4
PROMPTS = ["a ball", "a ball", "a box", "a box", "a box", "a ball", "a ring", "a ring"]

CASES = {
    "none": {"memory": "none"},
    "sink": {"memory": "sink", "window_frames": 9},
    "full": {"memory": "full"},
    "memflow": {},
    "whole chunk, strips": {"query_group": None, "token_order": "strips", "relevance": "softmax"},
    "moments, coverage": {"score": "moments", "top_k": 2, "relevance": "coverage"},
    "redundancy": {"redundancy": 0.9, "bank_frames": 2},
    "kept": {"reselect": "chunk", "top_k": 2, "recache": False, "stochastic": True},
    "host": {"device_frames": 4, "host_frames": 2, "bank_frames": 2},
    "bounded": {"positions": "bounded"},
    "int8": {"bank_dtype": "int8", "device_frames": 4, "host_frames": 2, "bank_frames": 2},
    "int8, bounded": {"bank_dtype": "int8", "positions": "bounded"},
    "random": {"selection": "random", "relevance": "random", "top_k": 2},
    "released": {
        "memory": "released",
        "window_frames": 9,
        "record_interval": 1,
        "bank_frames": 2,
        "bank_schedule": "single-prompt",
    },
    "interactive": {"memory": "released", "window_frames": 9, "record_interval": 1, "bank_frames": 2},
    "interactive, top": {"memory": "released", "record_interval": 1, "bank_frames": 2, "top_frames": 2},
}


SEEDS = {"int8, bounded": 4}
"""Of the weights and the noise, for cases that have others than the rest: with these a number of an int8 bank has been
seen to be rounded to another code by two processes than by one."""


def make_model(case: str = "") -> CausalVideoModel:
    """4 heads; 6 tokens a frame, so that 4 processes have 5, 5, 4 and 4 of the 18 of a chunk."""
    torch.manual_seed(SEEDS.get(case, 3))
    sizes = {"dim": 8 * HEADS, "ffn_dim": 16, "num_heads": HEADS, "num_layers": LAYERS, "in_dim": 2, "out_dim": 2}
    config = ModelConfig(**sizes, text_dim=TEXT_DIM, text_len=TEXT_LEN, freq_dim=8, prediction="x0")
    model = CausalVideoModel(config).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name or "norm" in name:  # sharper attention, and norms that tell heads apart
            parameter.data.mul_(1 + torch.rand_like(parameter))
    return model


def encode(prompts) -> Tensor:
    rows = []
    for prompt in prompts:
        generator = torch.Generator().manual_seed(sum(map(ord, prompt)))
        rows.append(F.pad(torch.randn(2, TEXT_DIM, generator=generator), (0, 0, 0, 1)))
    return torch.stack(rows)


def prompts_of(index: int) -> list[str]:
    """Of two stories that switch at different chunks."""
    return [PROMPTS[index % 8], PROMPTS[(index + 3) // 2 % 8]]


def make_streamer(model: CausalVideoModel, case: str, ranks=None, history_dir=None, **changes) -> Streamer:
    sizes = {"height": 4, "width": 6, "steps": 2, "block_size": 4, "query_group": 5, "top_k": 4, "device_frames": 30}
    settings = StreamSettings(**{**sizes, "shift": 7.0, **CASES[case], **changes})
    seed = SEEDS.get(case, 4)
    return Streamer(model, 2, settings, seed=seed, encode=encode, ranks=ranks, history_dir=history_dir)


class Collectives(TorchDispatchMode):
    """Notes the name of every collective, and how many bytes this process has put into it."""

    def __init__(self):
        super().__init__()
        self.noted: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and not any(
            word in func.__name__ for word in ("wait", "wrap")
        ):
            given = args[0] if isinstance(args[0], Tensor) else args[1]
            self.noted.append((func.__name__.split(".")[0], given.nbytes))
        return func(*args, **(kwargs or {}))


def told(chunk: Chunk) -> dict:
    """All of a chunk that must be equal, and not only close."""
    names = ("index", "first_frame", "prompts", "retrieved", "candidates", "activation")
    return {name: getattr(chunk, name) for name in names}


def cache_tensors(streamer: Streamer) -> list[Tensor]:
    """All that lies on the device for the past: window, bank, history and means."""
    cache = streamer.cache
    return [
        cache._keys,
        cache._values,
        cache._descriptors,
        *(getattr(cache, name) for name in ("_means",) if hasattr(cache, name)),
    ]


STOPPED = ("int8", "int8, bounded", "random", "interactive", "bounded")
"""Cases that are stopped at chunk 5 and continued by other processes."""


def int8_codes(streamer: Streamer) -> dict:
    """The codes of keys and values of all heads in the int8 bank, (layers, B, places, tokens, heads, D) each, and the
    frame places that they are of; several processes must ask for them together."""
    saved = streamer.cache.state_dict()
    if streamer.ranks is not None:
        saved = whole_state(saved, streamer.ranks)
    return {"places": saved["places"], "codes": saved["pools"][:2]}


def set_int8_codes(streamer: Streamer, given: dict) -> None:
    """Puts the codes of another run of the same stream into the bank of this one, which one process makes."""
    for pool, codes in zip(streamer.cache._bank[:2], given["codes"], strict=True):
        for number, place in enumerate(given["places"]):
            pool[:, :, place] = codes[:, :, number]


def run(streamer: Streamer, chunks: int = CHUNKS, counted: bool = False, codes: Sequence[dict] = ()) -> dict:
    """What a stream makes: its latents, what each chunk tells, its scores, the bank after each choice, of an int8 bank
    its codes after each chunk, and the bytes of its cache; where they are counted, which takes a while, the collectives
    of each chunk.

    codes: of another run for each of these chunks; they take the place of this one's after the chunk.
    """
    made, banks, counts, own_codes = [], [], [], []
    given = iter(codes)
    while streamer.cache.committed < chunks:
        begin = streamer.cache.begin_chunk

        def noted(begin=begin):
            if not streamer.cache.recaches:
                banks.append(streamer.cache.bank_by_layer())
            return begin()

        streamer.cache.begin_chunk = noted
        with Collectives() if counted else nullcontext() as collectives:
            made.append(streamer.next_chunk(prompts_of(streamer.cache.committed)))
        if collectives is not None:
            counts.append(collectives.noted)
        streamer.cache.begin_chunk = begin
        if streamer.settings.bank_dtype:
            own_codes.append(int8_codes(streamer))
        if codes:
            set_int8_codes(streamer, next(given))
    return {
        "frames": torch.cat([chunk.frames for chunk in made], 2),
        "told": [told(chunk) for chunk in made],
        "scores": [chunk.relevance for chunk in made],
        "banks": banks,
        "codes": own_codes,
        "collectives": counts,
        "bytes": sum(tensor.nbytes for tensor in cache_tensors(streamer)),
    }
