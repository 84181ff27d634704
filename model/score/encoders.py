"""Encoders of frames: the toy world's judge, and folders of timm, open_clip and transformers on disk.

Nothing is downloaded, and only weights in safetensors are read.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from memflow_ops.model.checkpoints.containers import refuse_pointer
from memflow_ops.model.score.score import Encoder, to_float
from memflow_ops.model.toy.judge import halves, judge
from memflow_ops.model.toy.world import FRAME_SIZE, PATTERNS

TOY = "toy"
"""The name of the toy world's judge, in place of a folder."""
BATCH = 32


class ToyJudge:
    """The looks of the toy world: hue and pattern, which no prompt names. A cosine of two looks is half the cosine of
    the angle between their hues, and a half where the patterns are the same; who is not there has none."""

    name = "the toy world's judge"

    def whole(self, frames: np.ndarray) -> Tensor:
        return self._look(self._small(frames))

    def subject(self, frames: np.ndarray, named: Sequence[str], subject: str) -> Tensor:
        pictures = self._small(frames)
        if len(named) == 2:
            pictures = halves(pictures)[:, list(named).index(subject)]
        return self._look(pictures)

    def _small(self, frames: np.ndarray) -> Tensor:
        """Frames of a video as the judge takes them, (F, 3, 32, 32) in -1..1. A ValueError for another shape."""
        times = frames.shape[1] // FRAME_SIZE
        if not times or frames.shape[1:3] != (times * FRAME_SIZE, times * FRAME_SIZE):
            raise ValueError(
                f"videos of the toy world are squares of {FRAME_SIZE} pixels or a multiple, got "
                f"{frames.shape[2]} x {frames.shape[1]}"
            )
        return torch.nn.functional.avg_pool2d(to_float(frames), times) * 2 - 1

    def _look(self, pictures: Tensor) -> Tensor:
        seen = judge(pictures)
        hue = torch.deg2rad(seen.hue)
        pattern = torch.nn.functional.one_hot(seen.pattern, len(PATTERNS)).float()
        look = torch.cat([hue.cos()[:, None], hue.sin()[:, None], pattern], dim=1) / math.sqrt(2)
        return look * seen.present[:, None]


class FolderEncoder:
    """A network from a folder, which looks at whole frames."""

    def __init__(
        self,
        name: str,
        embed: Callable[[Tensor], Tensor],
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ):
        """embed: pictures (N, 3, height, width), normalised by mean and std -> features (N, D). size: height, width."""
        self.name, self.size = name, size
        self._embed, self._device = embed, device
        self._mean, self._std = (torch.tensor(x, dtype=torch.float32, device="cpu").view(3, 1, 1) for x in (mean, std))

    @torch.no_grad()
    def whole(self, frames: np.ndarray) -> Tensor:
        found = []
        for start in range(0, len(frames), BATCH):
            pictures = torch.nn.functional.interpolate(
                to_float(frames[start : start + BATCH]), self.size, mode="bicubic", antialias=True
            ).clamp(0, 1)
            found.append(self._embed(((pictures - self._mean) / self._std).to(self._device)).float().cpu())
        return torch.cat(found)

    def subject(self, frames: np.ndarray, named: Sequence[str], subject: str) -> Tensor:
        return self.whole(frames)


def load_encoder(path: str, device: torch.device) -> Encoder:
    """The encoder in a folder, or the toy world's judge for "toy".

    Folders: of timm (config.json with "architecture"), of open_clip (open_clip_config.json), and of transformers
    (config.json with "model_type"), as their programs save them. A FileNotFoundError or ValueError where there is none.
    """
    if path == TOY:
        return ToyJudge()
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no encoder at {path}: expected the folder of a timm, open_clip or transformers model")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"{path} has no weights in safetensors, and others are not read")
    for file in weights:
        refuse_pointer(file)
    if (folder / "open_clip_config.json").is_file():
        return _open_clip(folder, device)
    config = _config(folder / "config.json")
    if "architecture" in config:
        return _timm(folder, device)
    if "model_type" in config:
        return _transformers(folder, device)
    raise ValueError(f"{folder / 'config.json'} names neither an architecture of timm nor a model_type of transformers")


def _config(path: Path) -> dict:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is no object of JSON")
    return said


def _timm(folder: Path, device: torch.device) -> Encoder:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise _missing("timm", "timm") from error
    model = timm.create_model(f"local-dir:{folder.absolute()}", pretrained=True, num_classes=0).to(device).eval()
    data = timm.data.resolve_model_data_config(model)
    return FolderEncoder(folder.name, model, data["input_size"][1:], data["mean"], data["std"], device)


def _open_clip(folder: Path, device: torch.device) -> Encoder:
    try:
        import open_clip
    except ModuleNotFoundError as error:
        raise _missing("open_clip", "open_clip_torch") from error
    model = open_clip.create_model(f"local-dir:{folder.absolute()}", device=device).eval()
    size = model.visual.image_size
    height, width = (size, size) if isinstance(size, int) else size
    return FolderEncoder(
        folder.name, model.encode_image, (height, width), model.visual.image_mean, model.visual.image_std, device
    )


def _transformers(folder: Path, device: torch.device) -> Encoder:
    try:
        from transformers import AutoModel
    except ModuleNotFoundError as error:
        raise _missing("transformers", "transformers") from error
    try:
        model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).to(device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} cannot be loaded by transformers: {error}") from error
    vision = getattr(model.config, "vision_config", model.config)
    size = getattr(vision, "image_size", None)
    if size is None:
        raise ValueError(f"{folder} holds a {model.config.model_type!r} model, which does not look at pictures")
    height, width = (size, size) if isinstance(size, int) else size
    prepared = folder / "preprocessor_config.json"
    said = _config(prepared) if prepared.is_file() else {}

    def embed(pictures: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            seen = model.get_image_features(pixel_values=pictures)
        else:
            seen = model(pixel_values=pictures)
        if isinstance(seen, Tensor):
            return seen
        return seen.pooler_output if seen.get("pooler_output") is not None else seen.last_hidden_state[:, 0]

    mean, std = said.get("image_mean", [0.5] * 3), said.get("image_std", [0.5] * 3)
    return FolderEncoder(folder.name, embed, (height, width), mean, std, device)


def _missing(package: str, install: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"{package} is not installed; this encoder needs it: pip install {install}", name=package
    )
