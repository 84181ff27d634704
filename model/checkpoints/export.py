"""Writes a checkpoint as a folder that diffusers loads: `WanTransformer3DModel.from_pretrained(folder)`."""

import json
from pathlib import Path
from typing import Any

import torch

from memflow_ops.files import check_folder, write_atomically
from memflow_ops.model.checkpoints import native
from memflow_ops.model.checkpoints.containers import some
from memflow_ops.model.checkpoints.layouts import diffusers_name
from memflow_ops.model.checkpoints.pretrained import Pretrained, in_dtype, origin
from memflow_ops.model.wan.transformer import ModelConfig

WEIGHTS, CONFIG, INDEX = "diffusion_pytorch_model.safetensors", "config.json", "model_index.json"
_OTHER_PARTS = ("scheduler", "text_encoder", "tokenizer", "transformer_2", "vae")


def check_diffusers_folder(out: Path) -> None:
    """A ValueError if no folder for diffusers can be written here. One that holds other files is refused: shards of an
    older model, for example, would be loaded in place of the new file."""
    if out.suffix in (".safetensors", ".pt", ".pth"):
        raise ValueError(f"what is written for diffusers is a folder, got the name of a file, {out}")
    check_folder(out)
    others = (
        sorted(path.name for path in out.iterdir() if path.name not in (WEIGHTS, CONFIG, INDEX)) if out.is_dir() else []
    )
    if others:
        raise ValueError(f"the folder {out} holds other files ({some(others, 5)}); expected a new or an empty one")


def write_diffusers(pretrained: Pretrained, out: Path, dtype: torch.dtype | None = None) -> None:
    """Writes weights and config of a transformer into the folder `out`, in the layout of diffusers, and an index by
    which `WanPipeline.from_pretrained(out, vae=..., ...)` finds it.

    dtype: as for `convert`. A ValueError where diffusers' transformer computes something else than the model.
    """
    config = pretrained.config
    if config.prediction != "velocity" or config.in_dim != config.out_dim:
        raise ValueError(
            f"{pretrained.source} cannot be a WanTransformer3DModel for text to video: it takes {config.in_dim} "
            f"channels, makes {config.out_dim} and predicts {config.prediction}; expected as many, and velocity"
        )
    check_diffusers_folder(out)
    weights = {diffusers_name(name): tensor for name, tensor in in_dtype(pretrained, dtype).items()}
    for name in (CONFIG, INDEX):  # so that an interruption never leaves new weights under an old config
        (out / name).unlink(missing_ok=True)
    native.write_safetensors(out / WEIGHTS, weights, {"format": "pt", "origin": origin(pretrained)})
    for name, content in ((CONFIG, diffusers_config(config)), (INDEX, _index())):
        write_atomically(out / name, (json.dumps(content, indent=2) + "\n").encode())


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of diffusers' WanTransformer3DModel with these sizes. It has no place for the text length."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }


def _index() -> dict[str, Any]:
    """The model_index.json of a WanPipeline of which this folder is the transformer. The other parts are not here."""
    return {
        "_class_name": "WanPipeline",
        **{name: [None, None] for name in _OTHER_PARTS},
        "transformer": ["diffusers", "WanTransformer3DModel"],
    }
