"""The text of a stream: prompts, their embeddings, and the keys and values that the text cross-attention reads."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from memflow_ops.cache.attend import HeadShare
from memflow_ops.model.wan.transformer import CausalVideoModel, TextKeysValues

TextEncoder = Callable[[Sequence[str]], Tensor]
"""B prompts -> embeddings (B, Lt, text_dim). The rows past a text's true length are zero, as Wan's text encoder leaves
them."""


def check_prompts(prompts: Sequence[str]) -> list[str]:
    """The prompts of one chunk, one per story, as a list; a TypeError for anything but a sequence of strings."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"a chunk takes a sequence of prompts, one per story, got {prompts!r}")
    return list(prompts)


class StreamText:
    """The text of B stories. It is encoded only when a prompt changes, and each story by itself, so that a story in a
    batch has the same keys as alone. All tensors that a pass reads stay where they are, for CUDA graphs.

    prompts: per story the prompt that its keys and values belong to; None while they belong to none.
    keys_values: per layer the keys and values (B, text_len, heads, head_dim).
    lengths: (B,) int32, the tokens of each text that are not padding.
    """

    def __init__(self, model: CausalVideoModel, encode: TextEncoder, batch: int, heads: HeadShare | None = None):
        """heads: those that `keys` is of; None: all."""
        self._heads = heads
        config, weight = model.config, model.patch_embedding.weight
        self.model, self.encode = model, encode
        self.prompts: list[str | None] = [None] * batch
        self.embeddings: list[Tensor] = [torch.empty(0, dtype=torch.float32, device="cpu")] * batch
        shape = (batch, config.text_len, config.num_heads, config.head_dim)
        self.keys_values: TextKeysValues = [
            (weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(config.num_layers)
        ]
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=weight.device)

    @property
    def keys(self) -> list[Tensor]:
        """Per layer the keys (B, text_len, heads, head_dim) that retrieval goes by, of the heads of this process."""
        return [keys if self._heads is None else self._heads.of(keys) for keys, _ in self.keys_values]

    def embed(self, prompts: Sequence[str]) -> dict[int, Tensor]:
        """Story -> embedding (Lt, text_dim) of every prompt that differs from the story's current one. This changes
        nothing yet; a ValueError where the encoder's result does not fit the model."""
        changed = [story for story, prompt in enumerate(prompts) if self.prompts[story] != prompt]
        if not changed:
            return {}
        embeddings = self.encode([prompts[story] for story in changed])
        self.model.check_text(embeddings)
        if len(embeddings) != len(changed):
            raise ValueError(f"encode must give one embedding per prompt, got {len(embeddings)} for {len(changed)}")
        return dict(zip(changed, embeddings.to(self.lengths.device), strict=True))

    def set(self, prompts: Sequence[str | None], embeddings: Mapping[int, Tensor]) -> None:
        """Writes keys and values of the stories in `embeddings`. If this is interrupted, the story has no prompt."""
        for story, embedding in embeddings.items():
            self.prompts[story] = None
            for kept, new in zip(self.keys_values, self.model.encode_text(embedding[None]), strict=True):
                for target, source in zip(kept, new, strict=True):
                    target[story] = source[0]
            positions = torch.arange(1, len(embedding) + 1, device=embedding.device, dtype=torch.int32)
            self.lengths[story] = ((embedding != 0).any(-1) * positions).amax()
            self.embeddings[story] = embedding
            self.prompts[story] = prompts[story]
