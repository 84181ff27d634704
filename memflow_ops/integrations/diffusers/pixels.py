"""From a WanPipeline to pixels with memory: the loop over chunks, and their decoding one after the other."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from memflow_ops.integrations.diffusers.checks import uncompiled

OUTPUT_TYPES = ("np", "pt", "pil", "latent")


def checked_output_type(output_type: object) -> str:
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {', '.join(OUTPUT_TYPES)}, got {output_type!r}")
    return str(output_type)


def as_output(pipe: Any, video: Tensor, output_type: str) -> Any:
    """A video (B, C, frames, H, W) as diffusers hands it out; latents as they are."""
    return video if output_type == "latent" else pipe.video_processor.postprocess_video(video, output_type)


def stream(
    memory: Any,
    pipe: Any,
    prompts: Sequence[str | Sequence[str]],
    *,
    num_inference_steps: int = 4,
    sigmas: Sequence[float] | None = None,
    guidance_scale: float = 1.0,
    negative_prompt: str = "",
    recache: bool = False,
    generator: torch.Generator | None = None,
    max_sequence_length: int = 512,
    decode: bool = True,
) -> Iterator[Tensor]:
    """See `WanMemory.stream`. Yields (B, 3, frames, H, W) from -1 to 1, or without `decode` latents.

    Checks at once; what it returns does the work, chunk by chunk.
    """
    chunks = [[entry] if isinstance(entry, str) else list(entry) for entry in _entries(prompts)]
    stories = len(chunks[0])
    if any(len(chunk) != stories or not all(isinstance(p, str) for p in chunk) for chunk in chunks) or not stories:
        raise ValueError("prompts must have an entry per chunk: a prompt, or a list of as many prompts in every chunk")
    guided = guidance_scale > 1
    needed = stories * (2 if guided else 1)
    if memory.layout.batch != needed:
        raise ValueError(
            f"{stories} stories {'with' if guided else 'without'} guidance need a memory with batch={needed}, got "
            f"batch={memory.layout.batch}"
        )
    if not sigmas and (isinstance(num_inference_steps, bool) or num_inference_steps < 1):
        raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
    if sigmas is not None and "sigmas" not in inspect.signature(pipe.scheduler.set_timesteps).parameters:
        raise ValueError(f"{type(pipe.scheduler).__name__} takes no sigmas; give num_inference_steps")
    _check_pipeline(memory, pipe, decode)
    if memory.is_open:
        raise RuntimeError("a chunk is open; commit it, or give it up with abort")
    steps = {"sigmas": list(sigmas)} if sigmas is not None else {"num_inference_steps": num_inference_steps}

    def encode(chunk: list[str]) -> Tensor:
        embeddings, negative = pipe.encode_prompt(
            prompt=chunk,
            negative_prompt=[negative_prompt] * stories,
            do_classifier_free_guidance=guided,
            max_sequence_length=max_sequence_length,
            device=memory.device,
        )
        text = torch.cat([embeddings, negative]) if guided else embeddings
        return text.to(memory.transformer.patch_embedding.weight.dtype)

    def run() -> Iterator[Tensor]:
        memory.reset()
        decoder = ChunkDecoder(pipe.vae) if decode else None
        before, past = chunks[0], _Past(memory, guided)
        with torch.no_grad():
            text = encode(before)
        for chunk in chunks:
            switch: dict[str, Any] = {}
            if chunk != before:
                if recache:
                    switch = past.switch([old != new for old, new in zip(before, chunk, strict=True)])
                with torch.no_grad():
                    text, before = encode(chunk), chunk
            latents = _chunk_of_latents(memory, pipe, text, switch, steps, guidance_scale, guided, generator)
            if recache:
                past.add(latents)
            yield latents if decoder is None else decoder.decode(latents)
        pipe.maybe_free_model_hooks()

    return run()


def _entries(prompts: object) -> Sequence[Any]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise ValueError(f"prompts must be a list with an entry per chunk, got {prompts!r}")
    return prompts


def _check_pipeline(memory: Any, pipe: Any, decode: bool) -> None:
    """A ValueError unless the pipeline makes videos from text with this memory's transformer alone."""
    if uncompiled(pipe.transformer) is not memory.transformer:
        raise ValueError(
            "this memory is not attached to the pipeline's transformer: attach_memory(pipe.transformer, ...)"
        )
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            "the pipeline has a second transformer for low noise, which would see no memory (Wan 2.2 A14B)"
        )
    channels = pipe.transformer.config.in_channels
    if channels != pipe.transformer.config.out_channels or (decode and channels != pipe.vae.config.z_dim):
        raise ValueError(
            f"the transformer takes {channels} channels and gives {pipe.transformer.config.out_channels}, and the "
            f"VAE's latents have {pipe.vae.config.z_dim}: only models that make videos from text alone are supported"
        )


class _Past:
    """The latents of the chunks that stay in the window, which a prompt switch passes again."""

    def __init__(self, memory: Any, guided: bool):
        self._memory, self._guided = memory, guided
        self._chunks: list[Tensor] = []

    def add(self, latents: Tensor) -> None:
        self._chunks.append(latents)
        layout = self._memory.layout
        del self._chunks[: max(0, len(self._chunks) - (layout.window_frames // layout.chunk_frames - 1))]

    def switch(self, switched: list[bool]) -> dict[str, Any]:
        """What `begin_chunk` is told where the prompts of these stories have changed."""
        if not self._chunks:
            return {}
        latents = torch.cat(self._chunks, 2).to(self._memory.transformer.patch_embedding.weight.dtype)
        if self._guided:  # the passes without the prompt stay under the negative one
            latents, switched = torch.cat([latents, latents]), [*switched, *[False] * len(switched)]
        return {"recache": latents, "switched": switched}


@torch.no_grad()
def _chunk_of_latents(
    memory: Any,
    pipe: Any,
    text: Tensor,
    switch: dict[str, Any],
    steps: dict[str, Any],
    guidance_scale: float,
    guided: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """Streams a chunk and commits it: latents (stories, C, F, h, w) in float32. A chunk that fails is given up.

    switch: from `_Past.switch` where the prompts have changed.
    """
    transformer, scheduler, layout = memory.transformer, pipe.scheduler, memory.layout
    dtype = transformer.patch_embedding.weight.dtype
    _, patch_height, patch_width = transformer.config.patch_size
    shape = (
        layout.batch // (2 if guided else 1),
        transformer.config.in_channels,
        layout.chunk_frames,
        memory.grid[0] * patch_height,
        memory.grid[1] * patch_width,
    )
    drawn_on = memory.device if generator is None else generator.device
    latents = torch.randn(shape, generator=generator, device=drawn_on, dtype=torch.float32).to(memory.device)
    takes = inspect.signature(scheduler.step).parameters
    extra = {"generator": generator} if "generator" in takes else {}

    def velocity(time: Tensor) -> Tensor:
        given = torch.cat([latents, latents]) if guided else latents
        out = pipe.transformer(given.to(dtype), time.expand(layout.batch), text, return_dict=False)[0].float()
        if not guided:
            return out
        with_prompt, without = out.chunk(2)
        return without + guidance_scale * (with_prompt - without)

    try:
        memory.begin_chunk(text, **switch)
        scheduler.set_timesteps(**steps, device=memory.device)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        for time in scheduler.timesteps:
            latents = scheduler.step(velocity(time), time, latents, return_dict=False, **extra)[0]
        with memory.clean():
            velocity(torch.zeros((), dtype=torch.float32, device=memory.device))
        memory.commit()
    except BaseException:
        memory.abort()
        raise
    return latents


class ChunkDecoder:
    """Decodes a video chunk by chunk with an AutoencoderKLWan, to the pixels that decoding it at once gives.

    The first latent frame becomes one frame of the video, and every later one `scale_factor_temporal`.
    """

    def __init__(self, vae: Any):
        self._vae = vae
        vae.clear_cache()  # makes `_feat_map`, with an entry per causal convolution
        self._past: list[Any] = list(vae._feat_map)
        self._started = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latents (B, C, F, h, w), as the transformer makes them -> (B, 3, frames, H, W) from -1 to 1."""
        vae = self._vae
        hook = getattr(vae, "_hf_hook", None)
        if hook is not None:  # an offloaded VAE comes to its device
            hook.pre_forward(vae)
        weight = vae.post_quant_conv.weight
        mean, std = (
            torch.tensor(numbers, device=weight.device, dtype=weight.dtype).view(1, -1, 1, 1, 1)
            for numbers in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames = []
        for x in vae.post_quant_conv(latents.to(mean) * std + mean).split(1, dim=2):
            frames.append(vae.decoder(x, feat_cache=self._past, feat_idx=[0], first_chunk=not self._started))
            self._started = True
        video = torch.cat(frames, dim=2)
        if vae.config.patch_size is not None:
            video = _unfolded(video, vae.config.patch_size)
        return video.clamp(-1, 1)


def _unfolded(x: Tensor, patch: int) -> Tensor:
    """Channels (B, C * patch * patch, F, h, w) of patches, columns before rows, as pixels (B, C, F, h * p, w * p)."""
    x = x.unflatten(1, (-1, patch, patch))  # (B, C, columns, rows, F, h, w)
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
