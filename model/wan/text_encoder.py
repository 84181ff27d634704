"""Wan 2.1's text encoder: UMT5 from transformers (extra [wan]), from a folder on disk, never from the network."""

import html
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from memflow_ops.model.checkpoints.containers import read_json, refuse_pointer
from memflow_ops.model.wan import release
from memflow_ops.model.wan.optional_deps import check_loaded, needs, own_memory, quiet

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")


def clean_prompt(prompt: str) -> str:
    """Cleans a prompt as Wan cleaned its captions: broken Unicode is repaired, HTML entities are decoded, and white
    space becomes single spaces."""
    with needs("ftfy"):
        import ftfy
    text = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", text).strip()


class UMT5TextEncoder:
    """Turns prompts into the text embeddings that `stream` takes.

    model: a UMT5EncoderModel of transformers. tokenizer: its tokenizer. text_len: tokens of a prompt at most, with the
    end token. A longer prompt is cut, with a warning; Wan cuts it silently.
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
        """Loads the encoder from the folder of a diffusers pipeline (with text_encoder/ and tokenizer/ in it), from the
        encoder's own folder, or from Wan's own release (its folder, or the file models_t5_*.pth in it). The tokenizer
        of the encoder's own folder is in it, or in tokenizer/ inside or beside it; that of the release in
        google/umt5-xxl/.

        A FileNotFoundError or ValueError if something is missing or is no UMT5; missing weights are named.
        """
        encoder, tokenizer = find_text_encoder(Path(path))
        with needs("transformers"):
            from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
        options: dict[str, Any] = {"local_files_only": True}
        try:
            words = AutoTokenizer.from_pretrained(tokenizer, **options)
        except Exception as error:  # the parsers of tokenizers raise errors of many types
            raise ValueError(f"{tokenizer} holds no tokenizer that transformers can load: {error}") from error
        if encoder.is_file():
            config = release.text_encoder_config(encoder)
            model = release.load_release(
                lambda: UMT5EncoderModel(UMT5Config(**config)),
                encoder,
                release.text_encoder_weights,
                dtype,
                device,
                release.TIED_IN_TEXT_ENCODER,
            )
            return cls(model, words, text_len)
        for file in encoder.glob("*.safetensors"):
            refuse_pointer(file)
        with quiet():
            loaded: Any = UMT5EncoderModel.from_pretrained(
                encoder, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
        model, info = loaded
        check_loaded(info, str(encoder), may_remain=("decoder.", "lm_head."))
        return cls(own_memory(model.to(device)), words, text_len)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings (B, Lt, dim) of B prompts in the model's dtype. Lt is the length of the longest; the rows past
        a prompt's true length are zero."""
        cleaned = [clean_prompt(prompt) for prompt in prompts]
        whole = self.tokenizer(cleaned).input_ids
        for prompt, ids in zip(prompts, whole, strict=True):
            if len(ids) > self.text_len:
                warnings.warn(
                    f"the prompt {prompt[:60]!r}... has {len(ids)} tokens and is cut to {self.text_len}", stacklevel=2
                )
        tokens = self.tokenizer(
            cleaned,
            padding=True,
            max_length=self.text_len,
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        ).to(self.device)
        # The encoder masks padding, so padding to the longest prompt gives the same result as padding to text_len.
        out = self.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return out * tokens.attention_mask[..., None].to(out.dtype)


class EncodedPrompts:
    """A text encoder for prompts that are known beforehand: they are encoded once, and the encoder can be freed."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor], prompts: Sequence[str]):
        """encode: is called once for each different prompt."""
        self._embeddings: dict[str, Tensor] = {}
        for prompt in dict.fromkeys(prompts):
            self._embeddings[prompt] = encode([prompt])[0]

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        """The embeddings (B, Lt, dim) of B prompts, zero past the length of each. A ValueError for an unknown
        prompt."""
        unknown = [prompt for prompt in prompts if prompt not in self._embeddings]
        if unknown:
            raise ValueError(f"these prompts have not been encoded beforehand: {unknown}")
        return pad_sequence([self._embeddings[prompt] for prompt in prompts], batch_first=True)


def find_text_encoder(path: Path) -> tuple[Path, Path]:
    """Finds a text encoder (its folder, or the file of Wan's own release) and the folder of its tokenizer; see
    `UMT5TextEncoder.from_folder`."""
    encoder = path / "text_encoder" if (path / "text_encoder").is_dir() else path
    file = release.release_file(encoder, release.TEXT_ENCODER)
    if file is not None:
        return file, _tokenizer((file.parent / release.TOKENIZER, file.parent / "tokenizer", file.parent))
    config = encoder / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"no text encoder at {path}: expected a folder with config.json, as transformers saves it, or with "
            f"{release.TEXT_ENCODER}"
        )
    kind = read_json(config).get("model_type")
    if kind != "umt5":
        raise ValueError(f"{encoder} holds a {kind!r} model; Wan 2.1's text encoder is a 'umt5'")
    return encoder, _tokenizer((encoder, encoder / "tokenizer", encoder.parent / "tokenizer"))


def _tokenizer(places: Sequence[Path]) -> Path:
    """The first of these folders that holds a tokenizer."""
    for place in places:
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return place
    raise FileNotFoundError(f"no tokenizer ({', '.join(_TOKENIZER_FILES)}) in {', '.join(map(str, places))}")
