"""Wan 2.1's decoder, AutoencoderKLWan from diffusers (extra [wan]), chunk by chunk and bit-identical to all at once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.wan.optional_deps import check_loaded, needs


def find_vae(path: Path) -> tuple[Path, dict[str, Any]]:
    """The VAE's folder, path itself or vae/ in it, and its config."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(f"no VAE at {path}: expected a folder with config.json, as diffusers saves it")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    if said.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"{folder} holds a {said.get('_class_name')!r}; Wan 2.1's VAE is an 'AutoencoderKLWan'")
    if said.get("patch_size") is not None:
        raise ValueError(f"{folder} is the VAE of Wan 2.2 (patch_size={said['patch_size']}); expected that of Wan 2.1")
    return folder, said


def load_vae(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """diffusers' AutoencoderKLWan of a pipeline's folder or its own, in eval mode.

    FileNotFoundError or ValueError where there is none; missing weights are named.
    """
    folder, _ = find_vae(Path(path))
    with needs("diffusers"):
        from diffusers import AutoencoderKLWan
    try:
        vae, info = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by diffusers: {error}") from error
    check_loaded(info, str(folder))
    return vae.to(device).eval()


STATE_FORMAT = "memflow-ops decoder 1"


class StreamingDecoder:
    """The decoder's state for one video: what its causal convolutions remember of the frames before.

    Several may share a VAE; each keeps its own memory. The first latent frame becomes one video frame, every other one
    `vae.config.scale_factor_temporal` (4).
    """

    def __init__(self, vae: Any):
        self._decoder, self._post_quant = vae.decoder, vae.post_quant_conv
        vae.clear_cache()  # sizes its list of memories, one per causal convolution
        self._memory: list[Any] = list(vae._feat_map)
        self._started = False
        weight = self._post_quant.weight
        shape = (1, -1, 1, 1, 1)
        self._mean, self._std = (
            torch.tensor(values, device=weight.device, dtype=weight.dtype).view(shape)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """The next latent frames (B, C, F, h, w), normalised as the transformer makes them -> (B, 3, frames, H, W) in
        -1..1, in the VAE's dtype."""
        z = latents.to(self._mean.device, self._mean.dtype) * self._std + self._mean
        frames = []
        for x in self._post_quant(z).split(1, dim=2):
            frames.append(
                self._decoder(x, feat_cache=self._memory, feat_idx=[0], first_chunk=not self._started).clamp(-1, 1)
            )
            self._started = True
        return torch.cat(frames, dim=2)

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, in host memory, as `torch.save` takes it: with this and `Streamer.state_dict` a video that
        is stopped between two chunks goes on to the same pixels, bit for bit."""
        memory = [x.cpu() if isinstance(x, Tensor) else x for x in self._memory]
        return {"format": STATE_FORMAT, "started": self._started, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the decoder of another process was; the VAE must have the same weights. A ValueError, before
        anything is changed, for what is no state of such a decoder."""
        memory = state.get("memory") if isinstance(state, Mapping) and state.get("format") == STATE_FORMAT else None
        if not isinstance(memory, list) or len(memory) != len(self._memory):
            raise ValueError(f"this is no state of a decoder with {len(self._memory)} causal convolutions")
        self._memory = [x.to(self._mean.device, self._mean.dtype) if isinstance(x, Tensor) else x for x in memory]
        self._started = bool(state["started"])

    @property
    def state_bytes(self) -> int:
        """What the convolutions remember, now."""
        return sum(x.nbytes for x in self._memory if isinstance(x, Tensor))
