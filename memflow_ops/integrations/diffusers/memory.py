"""The memory of the stories that are streamed through one transformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from memflow_ops.cache.attend import BlockSelection
from memflow_ops.cache.chosen import ChosenBlocks
from memflow_ops.cache.frame_cache import FrameCache
from memflow_ops.cache.layout import CacheLayout
from memflow_ops.cache.policies import Policy, Retrieved
from memflow_ops.integrations.diffusers import pixels
from memflow_ops.integrations.diffusers.checks import check_rotation, wan_rotation
from memflow_ops.integrations.diffusers.operator import NO_COMPILED_GRADIENTS, register
from memflow_ops.integrations.diffusers.passes import Pass, Passes
from memflow_ops.token_order import TokenOrder


class WanMemory:
    """The memory of the stories that are streamed through one transformer; `attach_memory` makes it.

    Per chunk: `begin_chunk`, passes of the transformer, one more in `clean`, and `commit`. Where a pass fails, the
    chunk stays open: repeat the pass, or give the chunk up with `abort`. `generate` does all of this.
    """

    def __init__(
        self,
        transformer: Any,
        layout: CacheLayout,
        grid: tuple[int, int],
        selection: BlockSelection,
        policy: Policy | None,
        impl: str,
        device: torch.device,
        chosen: ChosenBlocks | None = None,
        order: TokenOrder | None = None,
    ):
        self.transformer, self.layout, self.grid, self.policy = transformer, layout, grid, policy
        self.selection, self.impl, self.device = selection, impl, device
        self.chosen, self.order = chosen, order
        self.cache = FrameCache(layout, device)
        self.passes = Passes()
        self.number = torch.tensor(register(self), dtype=torch.int64, device="cpu")
        """Under which `attend_in_memory` finds this memory; the processors share the tensor."""
        self._open = False
        self._attached = True
        self._written: set[int] = set()  # layers of the open chunk
        self._clean: set[int] = set()  # layers that a clean pass has written last
        self._chosen_by_noisy: set[int] = set()  # layers whose blocks a noisy pass over the open chunk has chosen last
        self._rotation_checked = False  # whether the model's RoPE has been compared with ours in this chunk
        self._empty = self.cache.state_dict()
        self._hook = transformer.register_forward_pre_hook(self._check_pass, with_kwargs=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A deep copy is another memory. Its processors share the copied number with it."""
        self.__dict__.update(state)
        self.number.fill_(register(self))

    @property
    def is_open(self) -> bool:
        """Whether a chunk has been begun and not committed."""
        return self._open

    # ------------------------------------------------------------------------------------------------------- the chunk

    @torch.no_grad()
    def begin_chunk(
        self,
        text: Tensor,
        text_lengths: Sequence[int] | None = None,
        *,
        recache: Tensor | None = None,
        switched: Sequence[bool] | None = None,
    ) -> Retrieved:
        """Opens the next chunk with the frames that its prompts retrieve, and returns those frames.

        text: embeddings (B, Lt, text_dim), as the transformer is given them.
        text_lengths: how many leading embeddings of each story are no padding; None: up to the last that is not zero.
        recache: the clean latents (B, C, frames, height, width) of the newest finished frames, at least the
            `recached_frames`, at a prompt switch: the window then forgets what it was written under, and the
            transformer passes these frames again under `text`, oldest first, each chunk seeing those before it, sink
            and bank. (The interactive programs of LongLive and MemFlow pass the whole window at once.)
        switched: the stories whose prompt has changed, the only ones that are written again; None: all.

        A chunk that no pass has written may be begun again, also after a re-caching that has failed, which has to be
        asked for again. A RuntimeError where another is open or the memory has been detached, a ValueError where text
        or latents do not fit.
        """
        batch = self.layout.batch
        if not self._attached:
            raise RuntimeError("begin_chunk: this memory has been detached; attach_memory makes another")
        if self._open and self._written:
            raise RuntimeError("begin_chunk: a chunk is open; commit it, or give it up with abort")
        if text.dim() != 3 or text.shape[0] != batch or not text.shape[1]:
            raise ValueError(f"text must be embeddings ({batch}, tokens, text_dim), got shape {tuple(text.shape)}")
        if text_lengths is not None and (
            len(text_lengths) != batch or not all(0 <= length <= text.shape[1] for length in text_lengths)
        ):
            raise ValueError(
                f"text_lengths must be {batch} numbers from 0 to {text.shape[1]}, got {list(text_lengths)}"
            )
        if recache is not None:
            self._check_recache(recache, switched)
        self.abort()
        retrieved = Retrieved.nothing(batch)
        if self.policy is not None and self.layout.bank_frames and self.cache.candidate_frames()[0]:
            if text_lengths is None:
                positions = torch.arange(1, text.shape[1] + 1, device=text.device, dtype=torch.int32)
                lengths = ((text != 0).any(-1) * positions).amax(1).to(self.device, torch.int32)
            else:
                lengths = torch.tensor(text_lengths, dtype=torch.int32, device=self.device)
            text_keys = self._text_keys(text.to(self.device))
            retrieved = self.cache.choose_bank(self.policy, text_keys, lengths).read()
        if recache is not None:
            self._recache(recache, text, switched)
        self._open_chunk()
        return retrieved

    @property
    def recached_frames(self) -> int:
        """How many of the newest finished frames stay in the coming chunk's window, for `begin_chunk(recache=...)`."""
        layout = self.layout
        return min(self.cache.committed * layout.chunk_frames, layout.window_frames - layout.chunk_frames)

    def _check_recache(self, latents: Tensor, switched: Sequence[bool] | None) -> None:
        layout, config = self.layout, self.transformer.config
        size = (self.grid[0] * config.patch_size[1], self.grid[1] * config.patch_size[2])
        needed = self.recached_frames
        shape = tuple(latents.shape)
        if len(shape) != 5 or (shape[0], *shape[3:]) != (layout.batch, *size) or shape[2] < needed:
            raise ValueError(
                f"recache must be the latents of at least the newest {needed} finished frames, ({layout.batch}, "
                f"channels, {needed}, {size[0]}, {size[1]}), got {shape}"
            )
        if switched is not None and len(switched) != layout.batch:
            raise ValueError(f"switched must have {layout.batch} entries, one per story, got {len(switched)}")

    def _recache(self, latents: Tensor, text: Tensor, switched: Sequence[bool] | None) -> None:
        """Passes the frames that stay in the window again under a new prompt."""
        needed = self.recached_frames
        zeros = torch.zeros(self.layout.batch, dtype=torch.float32, device=self.device)
        try:
            self.cache.restart_window(switched)
            for first in range(latents.shape[2] - needed, latents.shape[2], self.layout.chunk_frames):
                self._open_chunk()
                chunk = latents[:, :, first : first + self.layout.chunk_frames]
                self.transformer(chunk, zeros, text, return_dict=False)
                self.cache.commit()
                self._close()
        except BaseException:
            self.abort()
            raise

    def _open_chunk(self) -> None:
        first = self.cache.begin_chunk()
        rotation = wan_rotation(self.layout.head_dim, self.layout.chunk_frames, self.grid, self.device, first)
        if self.order is not None:
            rotation = self.order.apply(rotation[0]), self.order.apply(rotation[1])
        self._rotation_checked = False
        self._written.clear()
        self._clean.clear()
        self._chosen_by_noisy.clear()
        self.passes.current = Pass(self, rotation, clean=False)
        self._open = True

    @contextmanager
    def clean(self) -> Iterator[None]:
        """Encloses the last pass of a chunk, over its finished latents at timestep 0."""
        before = self.passes.current
        if before is None:
            raise RuntimeError("clean: no chunk is open, call begin_chunk first")
        self.passes.current = Pass(self, before.rotation, clean=True)
        try:
            yield
        finally:
            if self.passes.current is not None:  # the chunk may have been given up
                self.passes.current = before

    def commit(self) -> None:
        """Closes the chunk after its clean pass. A RuntimeError where that is missing, and the chunk stays open."""
        missing = sorted(set(range(self.layout.layers)) - self._clean)
        if self._open and missing:
            raise RuntimeError(
                f"commit: the last pass over the chunk must be a clean one, in `with memory.clean():`, because later "
                f"chunks see the keys that it leaves; layers {missing[:5]}{' ...' if missing[5:] else ''} have none"
            )
        self.cache.commit()
        self._close()

    def abort(self) -> None:
        """Gives up the chunk that is open, and all that its passes have written. Does nothing between chunks."""
        self.cache.abort()
        self._close()

    def reset(self) -> None:
        """Forgets everything: the next chunk is the first of another video. An open chunk is given up."""
        self.abort()
        self.cache.load_state_dict(self._empty)

    def detach(self) -> None:
        """Puts the processors back that were there before, and gives up a chunk that is open.

        Those of a memory that has been attached since then stay. A RuntimeError where gradient checkpointing has still
        to compute passes again, which it could then do only without memory.
        """
        if self.passes.are_awaited:
            raise RuntimeError(
                "detach: the backward pass of a chunk has still to compute it again; run it, or delete its loss, first"
            )
        self.abort()
        for block in self.transformer.blocks:
            if self._is_ours(block):
                block.attn1.set_processor(block.attn1.processor.before)
        self._hook.remove()
        self._attached = False

    def _close(self) -> None:
        self.passes.current = None
        self._open = False

    # ------------------------------------------------------------------------------------------------------- the state

    def state_dict(self) -> dict[str, Any]:
        """All that later chunks will see, in host memory, as `torch.save` takes it. Only between chunks."""
        return {"grid": list(self.grid), "token_order": self.token_order, "cache": self.cache.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where a memory of the same sizes was when it made `state`.

        A ValueError where the state does not fit, a RuntimeError while a chunk is open, before anything is changed.
        """
        if self._open:
            raise RuntimeError("load_state_dict: a chunk is open; commit it, or give it up with abort")
        grid = state.get("grid") if isinstance(state, Mapping) else None
        if grid != list(self.grid):
            raise ValueError(f"the state is that of a memory for frames of {grid} tokens, here {list(self.grid)}")
        order = state.get("token_order", "raster")
        if order != self.token_order:
            raise ValueError(f"the state is that of a memory with token_order={order!r}, here {self.token_order!r}")
        if not isinstance(state.get("cache"), Mapping):
            raise ValueError("the state has no state of a cache; take what state_dict() of a memory returns")
        self.cache.load_state_dict(state["cache"])

    # -------------------------------------------------------------------------------------------------- from a pipeline

    def generate(self, pipe: Any, prompts: Sequence[str | Sequence[str]], **options: Any) -> Any:
        """Begins a video and returns it in pixels: that of `stream`, with its options, all chunks together."""
        output_type = pixels.checked_output_type(options.pop("output_type", "np"))
        chunks = pixels.stream(self, pipe, prompts, decode=output_type != "latent", **options)
        if output_type != "latent":
            chunks = (chunk.cpu() for chunk in chunks)  # a long video in pixels would fill the device
        return pixels.as_output(pipe, torch.cat(list(chunks), dim=2), output_type)

    def stream(
        self, pipe: Any, prompts: Sequence[str | Sequence[str]], *, output_type: str = "np", **options: Any
    ) -> Iterator[Any]:
        """Begins a video and yields every chunk in pixels as soon as it is finished; what the memory held is forgotten.

        pipe: diffusers' WanPipeline around this memory's transformer; its scheduler makes the steps.
        prompts: one entry per chunk; with more than one story, a list with a prompt for each.
        num_inference_steps: steps per chunk; 4.
        sigmas: noise levels in their place, such as (1, 0.75, 0.5, 0.25) for the released few-step models, whose
            scheduler is FlowMatchEulerDiscreteScheduler(shift=5, stochastic_sampling=True).
        guidance_scale, negative_prompt: above 1, classifier-free guidance, which needs a memory with
            batch = 2 * stories: the passes without the prompt remember for themselves.
        recache: whether the window is passed again under the new prompt where a story's prompt changes, see
            `begin_chunk`; for checkpoints that were tuned to it, such as LongLive's and MemFlow's. False.
        generator: draws the noise.
        max_sequence_length: tokens of a prompt; 512.
        output_type: "np" (B, frames, H, W, 3) from 0 to 1, "pt", "pil" or "latent", as in diffusers.

        A ValueError or TypeError before anything runs where pipe, prompts and memory do not fit. A chunk that fails is
        given up.
        """
        output_type = pixels.checked_output_type(output_type)
        chunks = pixels.stream(self, pipe, prompts, decode=output_type != "latent", **options)
        return (pixels.as_output(pipe, chunk, output_type) for chunk in chunks)

    # ----------------------------------------------------------------------------------------------- what passes call

    @property
    def token_order(self) -> str:
        return "raster" if self.order is None else "strips"

    def reuses_choice(self, layer: int, clean: bool) -> bool:
        """Whether a pass without gradients attends, in a layer, to the blocks that an earlier noisy one has chosen."""
        return self.chosen is not None and not clean and layer in self._chosen_by_noisy

    def mark_chosen(self, layer: int, clean: bool) -> None:
        """Notes that a pass without gradients has attended in a layer, and so chosen its blocks or reused a choice."""
        if clean:
            self._chosen_by_noisy.discard(layer)
        else:
            self._chosen_by_noisy.add(layer)

    def mark_written(self, layer: int, clean: bool) -> None:
        """Notes that a pass has written a layer of the open chunk."""
        self._written.add(layer)
        if clean:
            self._clean.add(layer)
        else:
            self._clean.discard(layer)

    def check_tokens(self, hidden_states: Tensor, rotary_emb: Any) -> None:
        """A ValueError unless these are the tokens of a chunk, and the model would rotate them as Wan does.

        The angles themselves are compared once in a chunk, and not in compiled code.
        """
        layout = self.layout
        if hidden_states.shape[:2] != (layout.batch, layout.chunk_tokens):
            raise ValueError(
                f"the open chunk has {layout.batch} stories of {layout.chunk_frames} frames, which are "
                f"{layout.chunk_tokens} chunk tokens; got {tuple(hidden_states.shape[:2])}"
            )
        if rotary_emb is None:
            raise ValueError("memory rotates queries and keys by RoPE; this attention was called without rotary_emb")
        if not (self._rotation_checked or torch.compiler.is_compiling()):
            check_rotation(rotary_emb, wan_rotation(layout.head_dim, layout.chunk_frames, self.grid, self.device))
            self._rotation_checked = True

    def _check_pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called before every pass of the transformer: refuses what memory cannot do for it."""
        self.passes.called_with_grad = torch.is_grad_enabled()
        if not self._open:
            return
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        _, patch_height, patch_width = self.transformer.config.patch_size
        layout, size = self.layout, (self.grid[0] * patch_height, self.grid[1] * patch_width)
        expected = (layout.batch, latents.shape[1], layout.chunk_frames, *size)
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"the open chunk has latents {expected} (stories, channels, frames, height, width), which are "
                f"{layout.chunk_tokens} chunk tokens; got {tuple(latents.shape)}: call attach_memory with their batch, "
                f"chunk_frames, height and width"
            )
        if latents.device.type != self.device.type:
            raise ValueError(
                f"the memory lies on {self.device} and the latents on {latents.device}: call attach_memory once the "
                f"transformer is on its device"
            )
        if not all(self._is_ours(block) for block in self.transformer.blocks):
            raise RuntimeError(
                "the processors of this memory have been replaced in the transformer; abort the chunk and call "
                "attach_memory again"
            )
        if torch.compiler.is_compiling():
            return
        compiled = any(getattr(block, "_compiled_call_impl", None) is not None for block in self.transformer.blocks)
        if compiled and torch.is_grad_enabled() and any(p.requires_grad for p in self.transformer.parameters()):
            raise RuntimeError(NO_COMPILED_GRADIENTS)

    def _is_ours(self, block: Any) -> bool:
        return getattr(block.attn1.processor, "memory", None) is self

    def _text_keys(self, text: Tensor) -> list[Tensor]:
        """Per layer the keys of the text cross-attention (B, Lt, heads, head_dim)."""
        text = text.to(self.transformer.patch_embedding.weight.dtype)
        context = self.transformer.condition_embedder.text_embedder(text)
        cross = [block.attn2 for block in self.transformer.blocks]
        keys = [attn.norm_k(_text_key(attn, context)).unflatten(2, (attn.heads, -1)) for attn in cross]
        return [k.to(self.layout.dtype) for k in keys]


def _text_key(attn: Any, context: Tensor) -> Tensor:
    """The keys of a cross-attention, whose projections may be fused to one of keys and values."""
    if getattr(attn, "fused_projections", False):
        return attn.to_kv(context).chunk(2, dim=-1)[0]
    return attn.to_k(context)
