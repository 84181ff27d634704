"""The files of Wan's own release beside the transformer: UMT5 (`models_t5_*.pth`) and the VAE (`Wan2.1_VAE.pth`).

Their names of weights become those of transformers and diffusers, and their shapes tell the configs.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from memflow_ops.model.checkpoints.containers import read_shapes, read_weights, some

Shapes = Mapping[str, tuple[int, ...]]

TEXT_ENCODER, VAE = "models_t5_*.pth", "Wan2.1_VAE.pth"
TOKENIZER = Path("google", "umt5-xxl")
"""Where the release keeps the tokenizer, beside the text encoder's file."""

_TEXT_ENCODER_NAMES = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
    (r"blocks\.(\d+)\.norm1\.weight", r"encoder.block.\1.layer.0.layer_norm.weight"),
    (r"blocks\.(\d+)\.norm2\.weight", r"encoder.block.\1.layer.1.layer_norm.weight"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.weight", r"encoder.block.\1.layer.0.SelfAttention.\2.weight"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.weight",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.weight",
    ),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.weight"),
    (r"blocks\.(\d+)\.ffn\.fc1\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.weight"),
    (r"blocks\.(\d+)\.ffn\.fc2\.weight", r"encoder.block.\1.layer.1.DenseReluDense.wo.weight"),
)
TIED_IN_TEXT_ENCODER = {"encoder.embed_tokens.weight": "shared.weight"}
_VAE_NAMES = (
    (r"conv1\.(\w+)", r"quant_conv.\1"),
    (r"conv2\.(\w+)", r"post_quant_conv.\1"),
    (r"(encoder|decoder)\.conv1\.(\w+)", r"\1.conv_in.\2"),
    (r"(encoder|decoder)\.head\.0\.(\w+)", r"\1.norm_out.\2"),
    (r"(encoder|decoder)\.head\.2\.(\w+)", r"\1.conv_out.\2"),
    (r"(encoder|decoder)\.middle\.0\.(.+)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.middle\.1\.(.+)", r"\1.mid_block.attentions.0.\2"),
    (r"(encoder|decoder)\.middle\.2\.(.+)", r"\1.mid_block.resnets.1.\2"),
    (r"encoder\.downsamples\.(\d+)\.(.+)", r"encoder.down_blocks.\1.\2"),
)
_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def release_file(path: Path, pattern: str) -> Path | None:
    """The file of the release that a path means: the path itself, or the only one of a folder that fits the pattern."""
    if path.is_file():
        return path
    found = sorted(path.glob(pattern)) if path.is_dir() else []
    if len(found) > 1:
        raise ValueError(
            f"{path} holds several files {pattern}: {some([file.name for file in found])}; name one of them"
        )
    return found[0] if found else None


def load_release(
    model_of: Callable[[], Any],
    path: Path,
    translate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
    dtype: torch.dtype,
    device: torch.device | str,
    tied: Mapping[str, str] | None = None,
) -> Any:
    """A model with the weights of a file of the release, in eval mode. A ValueError names what does not fit.

    model_of: makes it; it is called on the meta device. translate: gives the weights the model's names.
    tied: names of weights that are another one, which the file has.
    """
    tied = tied or {}
    with torch.device("meta"):
        model = model_of()
    weights = translate(read_weights(path).tensors)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    got = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    problems = [f"missing {name} {shape}" for name, shape in expected.items() if name not in got]
    problems += [f"unexpected {name} {shape}" for name, shape in got.items() if name not in expected]
    problems += [
        f"{name} has shape {got[name]}, expected {shape}"
        for name, shape in expected.items()
        if got.get(name, shape) != shape
    ]
    problems += [f"{name} is in {tensor.dtype}" for name, tensor in weights.items() if not tensor.is_floating_point()]
    if problems:
        raise ValueError(f"{path} is not whole, or not what its name says: {some(problems)}")
    placed: dict[str, Tensor] = {}
    for name in list(weights):  # one after another, so that the file's dtype is not held beside the model's as a whole
        placed[name] = weights.pop(name).to(device, dtype)
    model.load_state_dict({**placed, **{name: placed[other] for name, other in tied.items()}}, assign=True)
    return model.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------------------------- text encoder


def text_encoder_config(path: Path) -> dict[str, Any]:
    """The arguments of transformers' UMT5Config for a file of the release, by its shapes."""
    shapes = read_shapes(path, ())
    first = "blocks.0.attn.q.weight", "blocks.0.pos_embedding.embedding.weight", "blocks.0.ffn.fc1.weight"
    _require(shapes, ("token_embedding.weight", *first), path, "UMT5 text encoder")
    vocabulary, width = shapes["token_embedding.weight"]
    buckets, heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    blocks = {int(found[1]) for found in (re.match(r"blocks\.(\d+)\.", name) for name in shapes) if found}
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": shapes["blocks.0.attn.q.weight"][0] // heads,
        "d_ff": shapes["blocks.0.ffn.fc1.weight"][0],
        "num_layers": len(blocks),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def text_encoder_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the release's text encoder under the names of transformers' UMT5EncoderModel."""
    return {_renamed(name, _TEXT_ENCODER_NAMES): tensor for name, tensor in tensors.items()}


# ------------------------------------------------------------------------------------------------------------------ VAE


def vae_config(path: Path) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKLWan for a file of the release, by its shapes."""
    shapes = read_shapes(path, ())
    _require(shapes, ("encoder.conv1.weight", "conv2.weight", "decoder.head.2.weight"), path, "VAE")
    taken = shapes["encoder.conv1.weight"][1]
    if taken != 3:
        raise ValueError(f"{path} is the VAE of Wan 2.2 (it takes {taken} channels); expected that of Wan 2.1")
    per_stage = _blocks_per_stage(shapes, path)
    numbers = [int(found[1]) for found in (re.match(r"decoder\.upsamples\.(\d+)\.", name) for name in shapes) if found]
    starts = range(0, max(numbers) + 1, per_stage)
    widths = [shapes.get(f"decoder.upsamples.{start}.residual.2.weight", (0,))[0] for start in starts]
    width, channels = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
    temporal = [f"decoder.upsamples.{start + per_stage - 1}.time_conv.weight" in shapes for start in starts[:-1]]
    if channels != 16 or any(not each or each % width for each in widths):
        raise ValueError(
            f"{path} is no VAE of Wan 2.1: it has {channels} channels, expected 16, and stages {widths} wide, expected "
            f"multiples of {width}"
        )
    return {
        "base_dim": width,
        "z_dim": channels,
        "dim_mult": [each // width for each in widths[::-1]],
        "num_res_blocks": per_stage - 2,
        "temperal_downsample": temporal[::-1],
        "scale_factor_temporal": 2 ** sum(temporal),
        "scale_factor_spatial": 2 ** len(temporal),
    }


def vae_weights(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights of the release's VAE under the names of diffusers' AutoencoderKLWan."""
    per_stage = _blocks_per_stage({name: tuple(tensor.shape) for name, tensor in tensors.items()}, path)

    def named(name: str) -> str:
        name = re.sub(r"residual\.[0236]", lambda found: _RESIDUAL[found[0]], name).replace("shortcut", "conv_shortcut")
        found = re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.+)", name)
        if not found:
            return _renamed(name, _VAE_NAMES)
        stage, block = divmod(int(found[1]), per_stage)
        part = "upsamplers.0" if block == per_stage - 1 else f"resnets.{block}"
        return f"decoder.up_blocks.{stage}.{part}.{found[2]}"

    return {named(name): tensor for name, tensor in tensors.items()}


def _blocks_per_stage(shapes: Shapes, path: Path) -> int:
    """The blocks of a stage of the decoder, which in the release stand in one row: residual ones, then one that makes
    the picture larger."""
    found = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in shapes)
    larger = [int(match[1]) for match in found if match]
    if not larger:
        raise ValueError(f"{path} holds no VAE of Wan 2.1: its decoder has no name decoder.upsamples.N.resample")
    return min(larger) + 1


def _require(shapes: Shapes, names: tuple[str, ...], path: Path, what: str) -> None:
    missing = [name for name in names if name not in shapes]
    if missing:
        raise ValueError(
            f"{path} holds no {what} under the names of Wan's release: missing {', '.join(missing)}; the first it has: "
            f"{', '.join(sorted(shapes)[:5]) or 'none'}. Where transformers or diffusers saved it, give its folder"
        )


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for pattern, theirs in table:
        if found := re.fullmatch(pattern, name):
            return found.expand(theirs)
    return name
