"""The processes that make one video together, and what they tell one another.

torch.distributed's words are used: a process is a rank, numbered from 0. Every rank runs the same program on the same
stories, and all of them must come to every collective in the same order. So whatever decides what is computed next
(prompts, seeds, the choice of the bank, an interruption) has to be the same on all of them, and what could differ is
agreed on here.
"""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memflow_ops.cache.attend import HeadShare

TIMEOUT = 600.0
"""Seconds that a rank waits for the others in a collective before it gives up. Loading weights takes a while."""
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of every process that it starts."""

OF_A_COLLECTIVE = r"(?i)gloo|nccl|processgroup"
"""What errors of collectives say that are not ours but torch's, those that gather weights for one."""

# torch 2.13 gave it this name, and warns of the one before.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


def launched_ranks(environment: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun has started together, this one included; 1 where it has not started this one."""
    return int(environment["WORLD_SIZE"]) if all(name in environment for name in LAUNCHER) else 1


def possible_ranks(heads: int) -> list[int]:
    """The numbers of ranks above 1 that so many attention heads can be dealt out to, equally many to each."""
    return [count for count in range(2, heads + 1) if heads % count == 0]


def check_ranks(heads: int, count: int) -> None:
    """A ValueError unless `count` ranks can have equally many of the heads."""
    if heads % count:
        possible = possible_ranks(heads)
        choice = f"{', '.join(map(str, possible))} processes are possible" if possible else "only 1 process is possible"
        raise ValueError(f"{heads} attention heads cannot be dealt out to {count} processes: {choice}")


class LostRanks(RuntimeError):
    """A collective has failed, because another rank has ended or did not come in time."""


@contextmanager
def lost_if_it_fails(saying: str = "") -> Iterator[None]:
    """Raises a `LostRanks` where the collective inside fails. saying: a regular expression of what torch's error must
    say, where other code inside may fail too."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LostRanks) or not (isinstance(error, dist.DistError) or re.search(saying, str(error))):
            raise
        # The first line, without the place in the source of the backend that it begins with.
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error)).strip().partition("\n")[0] or type(error).__name__
        raise LostRanks(f"another process has ended or did not answer in time ({reason})") from error


class Ranks:
    """The ranks of one video.

    rank: the number of this one. count: how many there are. group: for collectives of torch.distributed. device: of
    this rank.

    What the methods return is the same on all ranks to the bit, given devices of one kind: every rank gathers all that
    the others have, and computes with it in the order of the ranks.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        self.group, self.device = group, device
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Ranks":
        return self  # A copy of a stream belongs to the same processes.

    def heads(self, heads: int) -> HeadShare:
        """This rank's part of so many attention heads; a ValueError where they cannot be dealt out."""
        check_ranks(heads, self.count)
        own = heads // self.count
        return HeadShare(self.rank * own, own, heads)

    def tokens(self, tokens: int) -> list[int]:
        """How many of so many tokens each rank has; they differ by one at most. A ValueError where a rank would have
        none."""
        if tokens < self.count:
            raise ValueError(f"{tokens} tokens cannot be dealt out to {self.count} processes")
        return [tokens // self.count + (rank < tokens % self.count) for rank in range(self.count)]

    def gather(self, x: Tensor) -> Tensor:
        """What every rank has given, (count, *x.shape); x has the same shape and dtype on all of them."""
        x = x.contiguous()
        gathered = x.new_empty(self.count, *x.shape)
        with lost_if_it_fails():
            _all_gather(gathered.flatten(), x.flatten(), group=self.group)
        return gathered

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, like x."""
        return self.gather(x).sum(0)

    def mean(self, x: Tensor) -> Tensor:
        """The mean over the ranks, like x."""
        return self.sum(x) / self.count

    def least(self, number: int) -> int:
        """The least of the numbers that the ranks give."""
        return int(self.gather(torch.tensor(number, dtype=torch.int64, device=self.device)).min())

    def any(self, flag: bool) -> bool:
        """Whether any rank says so. The host waits for the others."""
        return self.least(-int(flag)) < 0

    def tell(self, words: str) -> list[str]:
        """What every rank says, by rank."""
        said = words.encode()
        row = torch.zeros(-self.least(-len(said)) or 1, dtype=torch.uint8, device="cpu")
        row[: len(said)] = torch.tensor(list(said), dtype=torch.uint8, device="cpu")
        rows = self.gather(row.to(self.device)).cpu()
        return [bytes(row.tolist()).rstrip(b"\0").decode() for row in rows]


def rank_device(device: torch.device, environment: Mapping[str, str] = os.environ) -> torch.device:
    """The device of this rank: on CUDA the one that torchrun's LOCAL_RANK numbers. A ValueError where there is none."""
    if device.type != "cuda":
        return device
    local = int(environment.get("LOCAL_RANK", 0))
    if device.index not in (None, local):
        raise ValueError(f"with several processes each takes a device of its own: say --device cuda, got {device}")
    if local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine has no CUDA device: torch sees {torch.cuda.device_count()}; start no "
            f"more processes than there are devices (--nproc-per-node)"
        )
    return torch.device("cuda", local)


@contextmanager
def joined(device: torch.device, timeout: float = TIMEOUT) -> Iterator[Ranks]:
    """The ranks that torchrun has started, joined by NCCL on CUDA and by gloo on a CPU until the context is left.

    device: of this rank, see `rank_device`. timeout: seconds that a collective waits for a rank that does not come; the
    others then end with an error. A rank whose process has died is noticed at once by gloo.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout))
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("heads",))
    yield Ranks(mesh.get_group("heads"), device)
    # Not after an error: it would wait for ranks that are gone, and the process is about to end.
    dist.destroy_process_group()
