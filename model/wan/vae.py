"""Wan 2.1's VAE, AutoencoderKLWan from diffusers (extra [wan]), decoded chunk by chunk to the same bits as at once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.checkpoints.containers import read_json, refuse_pointer
from memflow_ops.model.wan import release
from memflow_ops.model.wan.optional_deps import check_loaded, needs, own_memory


def find_vae(path: Path) -> tuple[Path, dict[str, Any]]:
    """Finds a VAE: the folder that diffusers has saved, which is path itself or vae/ in it, or the file of Wan's own
    release. Returns it and its config."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    file = release.release_file(folder, release.VAE)
    if file is not None:
        return file, release.vae_config(file)
    config = folder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"no VAE at {path}: expected a folder with config.json, as diffusers saves it, or with {release.VAE}"
        )
    said = read_json(config)
    if said.get("_class_name") != "AutoencoderKLWan":
        raise ValueError(f"{folder} holds a {said.get('_class_name')!r}; Wan 2.1's VAE is an 'AutoencoderKLWan'")
    if said.get("patch_size") is not None:
        raise ValueError(f"{folder} is the VAE of Wan 2.2 (patch_size={said['patch_size']}); expected that of Wan 2.1")
    return folder, said


def load_vae(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Loads an AutoencoderKLWan of diffusers, in eval mode, from the folder of a pipeline or its own, or from the file
    of Wan's own release.

    A FileNotFoundError or ValueError if there is none; missing weights are named.
    """
    folder, config = find_vae(Path(path))
    with needs("diffusers"):
        from diffusers import AutoencoderKLWan
    if folder.is_file():
        return release.load_release(
            lambda: AutoencoderKLWan(**config), folder, lambda x: release.vae_weights(x, folder), dtype, device
        )
    for file in folder.glob("*.safetensors"):
        refuse_pointer(file)
    try:
        vae, info = AutoencoderKLWan.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by diffusers: {error}") from error
    check_loaded(info, str(folder))
    return own_memory(vae.to(device).eval())


STATE_FORMAT = "memflow-ops decoder 1"


class StreamingDecoder:
    """Decodes one video and keeps the past frames that the causal convolutions of the decoder need.

    Several of these may share a VAE, because each keeps its own past. The first latent frame becomes one video frame,
    every other one `vae.config.scale_factor_temporal` (4).
    """

    def __init__(self, vae: Any):
        self._decoder, self._post_quant = vae.decoder, vae.post_quant_conv
        vae.clear_cache()  # gives `_feat_map` one entry per causal convolution
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
        """Decodes the next latent frames (B, C, F, h, w), normalised as the transformer makes them, into video frames
        (B, 3, frames, H, W) from -1 to 1 in the VAE's dtype."""
        z = latents.to(self._mean.device, self._mean.dtype) * self._std + self._mean
        frames = []
        for x in self._post_quant(z).split(1, dim=2):
            frames.append(
                self._decoder(x, feat_cache=self._memory, feat_idx=[0], first_chunk=not self._started).clamp(-1, 1)
            )
            self._started = True
        return torch.cat(frames, dim=2)

    def state_dict(self) -> dict[str, Any]:
        """The past that the decoder keeps, in host memory, as `torch.save` takes it. With this and
        `Streamer.state_dict` a video that is stopped between two chunks can be continued to the same pixels, to the
        bit."""
        memory = [x.cpu() if isinstance(x, Tensor) else x for x in self._memory]
        return {"format": STATE_FORMAT, "started": self._started, "memory": memory}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues a saved decoder; the VAE must have the same weights. A ValueError, before anything is changed, if
        the state is not that of such a decoder."""
        memory = state.get("memory") if isinstance(state, Mapping) and state.get("format") == STATE_FORMAT else None
        if not isinstance(memory, list) or len(memory) != len(self._memory):
            raise ValueError(f"this is no state of a decoder with {len(self._memory)} causal convolutions")
        self._memory = [x.to(self._mean.device, self._mean.dtype) if isinstance(x, Tensor) else x for x in memory]
        self._started = bool(state["started"])

    @property
    def state_bytes(self) -> int:
        """The size in bytes of the past that the decoder keeps at present."""
        return sum(x.nbytes for x in self._memory if isinstance(x, Tensor))
