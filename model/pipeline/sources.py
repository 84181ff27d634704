"""Where the parts of a pipeline (transformer, text encoder, VAE) lie on disk, and how they are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memflow_ops.model.checkpoints.pretrained import DTYPES, Pretrained, read_pretrained
from memflow_ops.model.parallel.ranks import Ranks
from memflow_ops.model.parallel.weights import shard_weights
from memflow_ops.model.wan.text_encoder import EncodedPrompts, UMT5TextEncoder, find_text_encoder
from memflow_ops.model.wan.transformer import CausalVideoModel
from memflow_ops.model.wan.vae import find_vae, load_vae


@dataclass(frozen=True)
class Sources:
    """Where the parts of a pipeline lie on disk, and what their files do not say."""

    checkpoint: Path
    text_encoder: Path
    vae: Path | None
    """None if nothing is to be decoded."""
    lora: Path | None = None
    lora_alpha: float | None = None
    num_heads: int | None = None
    dtype: str = "auto"
    """A name of `DTYPES`, or auto: bfloat16 on CUDA and float32 on a CPU."""
    text_len: int | None = None
    ema: bool | None = None
    """As for `read_pretrained`, which these and those above are given to."""

    def check(self) -> None:
        """Checks all that can be checked without reading weights; raises a FileNotFoundError or ValueError."""
        find_text_encoder(self.text_encoder)
        if self.vae is not None:
            find_vae(self.vae)
        for path in (self.checkpoint, self.lora):
            if path is not None and not path.exists():
                raise FileNotFoundError(f"no weights at {path}")
        self.torch_dtype(torch.device("cpu"))

    def torch_dtype(self, device: torch.device) -> torch.dtype:
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {self.dtype!r}")
        return DTYPES[self.dtype]

    def read(self) -> Pretrained:
        """The transformer's weights, in host memory."""
        pretrained = read_pretrained(
            self.checkpoint,
            lora=self.lora,
            lora_alpha=self.lora_alpha,
            num_heads=self.num_heads,
            text_len=self.text_len,
            ema=self.ema,
        )
        config = pretrained.config
        if config.in_dim != config.out_dim:
            raise ValueError(
                f"{self.checkpoint} takes {config.in_dim} channels and makes {config.out_dim}: the others are a "
                f"condition, such as a picture, which is not given here; expected a text-to-video model"
            )
        return pretrained

    def absolute(self) -> "Sources":
        """The same with paths that do not depend on the working folder."""
        paths: dict[str, Any] = {name: x.absolute() for name, x in vars(self).items() if isinstance(x, Path)}
        return replace(self, **paths)

    def described(self) -> dict[str, object]:
        """For result files: names of files and folders without the path to them, which is private to the user."""
        return {name: value.name if isinstance(value, Path) else value for name, value in vars(self).items()}


def latent_size(vae: Path | None, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the latents of a video of so many pixels. A ValueError where these do not divide into the
    VAE's cells and Wan's patches of 2 x 2 latents."""
    scale = find_vae(vae)[1].get("scale_factor_spatial", 8) if vae is not None else 8
    if height % (2 * scale) or width % (2 * scale):
        raise ValueError(f"height and width must be multiples of {2 * scale} pixels, got {height} x {width}")
    return height // scale, width // scale


@dataclass(frozen=True)
class Parts:
    """The loaded parts of a pipeline, on their device."""

    model: CausalVideoModel
    vae: Any
    """None if the sources name none."""
    encode: EncodedPrompts

    @property
    def device(self) -> torch.device:
        return self.model.patch_embedding.weight.device


def load_parts(
    sources: Sources,
    pretrained: Pretrained,
    prompts: Sequence[str],
    device: torch.device,
    compiled: bool = False,
    ranks: Ranks | None = None,
    shard: bool = False,
) -> Parts:
    """Encodes every prompt, frees the text encoder, and then puts transformer and VAE on the device, so that they and
    the text encoder are never there together.

    compiled: whether the transformer's blocks are compiled when they first run. ranks: the processes that share the
    videos; the first of them alone has a VAE. shard: whether they also share the weights.
    """
    dtype = sources.torch_dtype(device)
    config = pretrained.config
    encoder = UMT5TextEncoder.from_folder(sources.text_encoder, text_len=config.text_len, dtype=dtype, device=device)
    width = encoder.model.config.d_model
    if width != config.text_dim:
        raise ValueError(
            f"{sources.text_encoder} makes embeddings {width} wide, the transformer takes {config.text_dim}"
        )
    encode = EncodedPrompts(encoder, prompts)
    del encoder
    if ranks is not None and shard:
        model = pretrained.build(dtype)
        shard_weights(model, ranks)
    else:
        model = pretrained.build(dtype, device)
    if compiled:
        model.compile_blocks()
    folder = sources.vae if ranks is None or ranks.rank == 0 else None
    vae = load_vae(folder, dtype, device) if folder is not None else None
    return Parts(model, vae, encode)
