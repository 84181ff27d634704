"""What a call costs the host: everything up to its launches, which are left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F

from memflow_ops.bench.cases.attention_inputs import AttentionInputs, ours
from memflow_ops.bench.harness.case import OURS, Built, Contender
from memflow_ops.bench.sizes import Size


@contextmanager
def without_launches() -> Iterator[None]:
    """Plan launches and allocate their results, but launch nothing."""
    from memflow_ops.kernels.launch import Launch  # Triton need not be installed where no kernel is measured.

    run = Launch.run
    try:
        Launch.run = lambda self: None  # type: ignore[method-assign]
        yield
    finally:
        Launch.run = run  # type: ignore[method-assign]


def call(size: Size, dtype: torch.dtype, device: torch.device, seed: int, bank_frames: int) -> Built:
    """memory_attention to window and bank without its launches, against a call of torch's attention to one key."""
    given = AttentionInputs.make(size, bank_frames, dtype, device, seed, impl="triton")
    whole = ours(given, dense_backend="own")
    one = given.q[:, :1].transpose(1, 2)

    def planned() -> object:
        with without_launches():
            return whole.call()

    def torchs() -> torch.Tensor:
        return F.scaled_dot_product_attention(one, one, one)

    def check() -> None:
        torch.testing.assert_close(torchs(), one)  # The only key has all of the weight.

    contenders = {OURS: replace(whole, call=planned, flops=0, bytes=0, graph=False)}
    return Built({**contenders, "torch": Contender(torchs, check, flops=4 * size.dim, graph=False)})
