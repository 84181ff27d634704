"""How a cache saves and loads its layout and the frame places that are in use."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import Tensor

from memflow_ops.cache.layout import CacheLayout


class SavedByState:
    """What can be saved by `state_dict` alone.

    Its tensors are views of one another, and kernels and CUDA graphs read them where they are. Pickle makes tensors of
    their own of them, so that what one of them is told the others would not see.
    """

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuses pickle, torch.save, copy.copy, and copy.deepcopy where a subclass has no `__deepcopy__`."""
        name = type(self).__name__
        raise TypeError(
            f"a {name} cannot be pickled or copied, because the tensors of the copy would not share memory as these "
            f"do: save what `state_dict()` returns, and give it to `load_state_dict()` of another {name} that was made "
            f"with the same arguments"
        )


def save_layout(layout: CacheLayout) -> dict[str, Any]:
    """All sizes of what is saved by name; the dtype as text, because `torch.load(weights_only=True)` must take it."""
    sizes = {name: size for name, size in asdict(layout).items() if name != "copied_frames"}
    return {**sizes, "dtype": str(layout.dtype)}


def check_layout(layout: CacheLayout, saved: object) -> None:
    """Raises a ValueError that names every size in which the saved layout differs."""
    own = save_layout(layout)
    if not isinstance(saved, Mapping):
        raise ValueError(f"the state has no layout of a cache, got {saved!r}")
    differing = [
        f"{name}={saved.get(name)!r}, here {value!r}" for name, value in own.items() if saved.get(name) != value
    ]
    if differing:
        raise ValueError(f"the state is that of a cache with {'; '.join(differing)}")


def save_places(pools: Sequence[Tensor], places: Sequence[int]) -> list[Tensor]:
    """Copies some places of pools (layers, B, P, ...) to host memory: (layers, B, len(places), ...) of each pool.

    It goes place by place, because the pools may fill the device.
    """
    saved = []
    for pool in pools:
        copy = torch.empty(*pool.shape[:2], len(places), *pool.shape[3:], dtype=pool.dtype, device="cpu")
        for i, place in enumerate(places):
            copy[:, :, i].copy_(pool[:, :, place])
        saved.append(copy)
    return saved


def check_places(name: str, pools: Sequence[Tensor], places: Sequence[int], saved: Sequence[Tensor]) -> None:
    """Raises a ValueError unless `saved` has the shapes that `save_places` gives for these pools and places."""
    expected = [(*pool.shape[:2], len(places), *pool.shape[3:]) for pool in pools]
    got = [tuple(tensor.shape) for tensor in saved]
    if got != expected or not all(0 <= place < pools[0].shape[2] for place in places):
        raise ValueError(f"the state's {name} must have the shapes {expected}, got {got} at places {list(places)}")


def load_places(pools: Sequence[Tensor], places: Sequence[int], saved: Sequence[Tensor]) -> None:
    """Copies what `save_places` has returned back to its places."""
    for pool, copy in zip(pools, saved, strict=True):
        for i, place in enumerate(places):
            pool[:, :, place].copy_(copy[:, :, i])
