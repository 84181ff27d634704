"""Wan 2.1's text encoder: UMT5 from transformers (extra [wan]), from a folder on disk, never from the network."""

import html
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memflow_ops.model.wan.optional_deps import check_loaded, needs, quiet

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def clean_prompt(prompt: str) -> str:
    """As Wan cleans its captions: mended Unicode, no HTML entities, single spaces."""
    with needs("ftfy"):
        import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5TextEncoder:
    """Prompts -> text embeddings, as `stream` takes them.

    model: transformers' UMT5EncoderModel. tokenizer: its tokenizer. text_len: tokens of a prompt at most, the end token
    included; what is longer is cut, with a warning, as Wan does silently.
    """

    def __init__(self, model: Any, tokenizer: Callable[..., Any], text_len: int = 512):
        self.model, self.tokenizer, self.text_len = model.eval(), tokenizer, text_len

    @classmethod
    def from_folder(
        cls,
        path: Path | str,
        *,
        text_len: int = 512,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "UMT5TextEncoder":
        """A diffusers pipeline's folder (with text_encoder/ and tokenizer/ in it), or the encoder's own, with the
        tokenizer in it or in tokenizer/ in or beside it.

        FileNotFoundError or ValueError where something is missing or no UMT5; missing weights are named.
        """
        encoder, tokenizer = find_text_encoder(Path(path))
        with needs("transformers"):
            from transformers import AutoTokenizer, UMT5EncoderModel
        options: dict[str, Any] = {"local_files_only": True}
        try:
            words = AutoTokenizer.from_pretrained(tokenizer, **options)
        except Exception as error:  # whatever its parsers raise
            raise ValueError(f"{tokenizer} holds no tokenizer that transformers can load: {error}") from error
        with quiet():
            loaded: Any = UMT5EncoderModel.from_pretrained(
                encoder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        model, info = loaded
        check_loaded(info, str(encoder), may_remain=("decoder.", "lm_head."))
        return cls(model.to(device), words, text_len)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, Lt, dim) in the model's dtype, Lt that of the longest, zero past each one's true length."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        whole = self.tokenizer(cleaned).input_ids
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > self.text_len:
                warnings.warn(
                    f"the prompt {prompt[:60]!r}... has {len(ids)} tokens and is cut to {self.text_len}", stacklevel=2
                )
        tokens = self.tokenizer(
            cleaned, padding=True, max_length=self.text_len, truncation=True, return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)  # fmt: skip
        # Padding is masked inside the encoder, so padding to the longest gives what padding to text_len would.
        out = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return out * tokens.attention_mask[..., None].to(out.dtype)


class EncodedPrompts:
    """Embeddings of prompts that were encoded beforehand, so that the encoder need not stay in memory."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], prompts: Sequence[str]):
        """encode: called once per different prompt."""
        self._embeddings: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            self._embeddings[prompt] = encode([prompt])[0]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, Lt, dim), zero past each one's length."""
        unknown = [prompt for prompt in prompts if prompt not in self._embeddings]
        if unknown:
            raise ValueError(f"these prompts have not been encoded beforehand: {unknown}")
        return pad_sequence([self._embeddings[prompt] for prompt in prompts], batch_first=True)


def find_text_encoder(path: Path) -> tuple[Path, Path]:
    """The folders of the encoder and of its tokenizer."""
    encoder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    config = encoder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"no text encoder at {path}: expected a folder with config.json, as transformers saves it"
        )
    try:
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except ValueError as error:
        raise ValueError(f"{config} is not JSON: {error}") from error
    if kind != "umt5":
        raise ValueError(f"{encoder} holds a {kind!r} model; Wan 2.1's text encoder is a 'umt5'")
    places = (encoder, encoder / "tokenizer", encoder.parent / "tokenizer")
    for place in places:
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return encoder, place
    raise FileNotFoundError(f"no tokenizer ({', '.join(_TOKENIZER_FILES)}) in {', '.join(map(str, places))}")
