"""A pipeline as diffusers lays it out on disk, every part small and random: transformer, UMT5 with tokenizer, VAE.

The folders whose tests need it import the fixtures in their conftest.py. Diffusers and transformers are imported when a
fixture is first used, because they take seconds to import.
"""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before their import: nothing here may ask the network

WORDS = ("a", "the", "ball", "box", "star", "in", "at", "meadow", "desert", "sea", "night", "returns")


@pytest.fixture(scope="session")
def transformer():
    """diffusers' transformer, its trained zeros replaced by noise so that every weight matters."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(3)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=32,
        ffn_dim=48, num_layers=2,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, transformer) -> Path:
    """A folder with transformer/, text_encoder/, tokenizer/ and vae/."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("pipeline")
    transformer.save_pretrained(folder / "transformer")

    torch.manual_seed(4)
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder / "tokenizer")
    config = UMT5Config(vocab_size=len(vocabulary), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")

    vae = AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    return folder
