"""What a stream and a model ask of a cache, whichever it is.

Per chunk a stream calls `update_bank` and `choose_bank`, after a prompt switch `restart_window`, then `begin_chunk`,
lets `attend_to_memory` write and read in every pass, and calls `commit`. `RingCache` has the part that is the same for
all; what is stated here, each cache does in its own way.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from memflow_ops.cache.policies import BankChoice, Policy
from memflow_ops.cache.state import SavedByState
from memflow_ops.ops.cache_write import QKNorm


class StreamCache(SavedByState, ABC):
    """What each cache does in its own way; with the life of a chunk in `RingCache`, all that a stream has to know.

    Calls out of order raise a RuntimeError and bad tensors a ValueError or TypeError, in both cases before anything is
    changed.
    """

    takes_projections: ClassVar[bool]
    """Whether `write_projections` also normalises queries and keys."""

    # -------------------------------------------------------------------------------------------------------- the chunk

    @abstractmethod
    def remember(self, layer: int, k: Tensor) -> None:
        """Says that the layer's last `write` was of the clean pass over a new chunk, which `commit` insists on. k: the
        layer's keys (B, chunk tokens, Hkv, D) *before* RoPE."""

    @abstractmethod
    def write_projections(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rotation: tuple[Tensor, Tensor],
        norm: QKNorm | None = None,
        *,
        remember: bool = False,
        memory_rotation: tuple[Tensor, Tensor] | None = None,
        memory_q: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Rotates queries and keys, and writes the keys and values of a layer as `write` does.

        q (B, chunk tokens, H, D), k and v (B, chunk tokens, Hkv, D), before RoPE. rotation: cosines and sines of the
        chunk's tokens, see `rope_rotation`. norm: what q and k have still to be normalised with, only where the cache
        `takes_projections`; None: they are normalised. remember: this is the clean pass of a new chunk.
        memory_rotation, memory_q, impl: of `memflow_ops.write_projections`; the first two only where no gradient is
        needed. Returns the rotated q.
        """

    # ------------------------------------------------------------------------------------------------- what is attended

    @abstractmethod
    def pass_shape(self, sparse: bool) -> tuple[object, ...]:
        """All that a pass over the open chunk depends on and that no tensor holds.

        Passes of one shape run the same kernels on the same memory, so that one CUDA graph can be all of them.

        sparse: the pass attends to `window` and to the bank in `memory`; otherwise to `dense`.
        """

    @abstractmethod
    def dense(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all that the cache remembers, (B, tokens, Hkv, D), the current chunk included."""

    def bank_turn(self) -> Tensor | None:
        """What moves the open chunk's rotated queries in time to where they stand for the bank, see `move_frames`.

        Complex64 (P,), of the leading P of the D / 2 pairs, in a tensor that stays where it is and is overwritten.
        None: they stand where they are.
        """
        return None

    # --------------------------------------------------------------------------------------------------------- the bank

    @abstractmethod
    def update_bank(self, text_keys: Sequence[Tensor], recached: Sequence[bool] | None = None) -> None:
        """Takes in what the last finished chunk leaves to the bank, where that depends on the prompt of that chunk.

        Comes before a chunk, and before the chunk's own prompt is encoded.

        text_keys: per layer the keys (B, text_len, H, D) of the text cross-attention for the *last* chunk's prompt,
        padding included. recached: the stories whose window will be re-cached next; None: no story's.
        """

    @abstractmethod
    def choose_bank(self, policy: Policy | None, text_keys: Sequence[Tensor], text_lengths: Tensor) -> BankChoice:
        """Chooses the frames that the coming chunk may attend to beyond its window, and says which they are.

        policy: what chooses (None: the cache chooses nothing, or has a rule of its own).
        text_keys, text_lengths: of the *coming* chunk's prompts, see `Policy.choose`.
        """

    def reads_ahead(self) -> bool:
        """Whether `expect_bank` would begin to read anything from a disk."""
        return False

    def expect_bank(self, policy: Policy, text_keys: Sequence[Tensor], text_lengths: Tensor) -> None:
        """Prepares for the bank that the policy would choose for the chunk after the coming one, under these texts;
        between `choose_bank` and `begin_chunk`, and only where the cache `reads_ahead`. It decides nothing."""

    def close(self) -> None:
        """Gives up what the cache holds beside its memory. It may not be used any more."""

    @abstractmethod
    def has_bank(self) -> bool:
        """Whether attention over selected blocks should look at `memory` in the open chunk. Waits for nothing."""

    @abstractmethod
    def bank_by_layer(self) -> list[list[list[int]]]:
        """Per layer and story the absolute index of every frame in `memory`, in its order. Waits for the device."""

    # -------------------------------------------------------------------------------------------------------- the state

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All that later chunks will see, in host memory: tensors, numbers and lists, as `torch.save` takes them.

        Only between chunks: a RuntimeError otherwise.
        """

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a cache of the same layout was when it made `state`.

        Frames lie in the same places, so that the sums of attention are the same to the bit. A ValueError, before
        anything is changed, when the state does not fit.
        """
