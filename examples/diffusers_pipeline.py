"""From a WanPipeline of diffusers to pixels with memory, tiny and with random weights.

Run it with `python examples/diffusers_pipeline.py`. It needs diffusers and transformers (pip install
'memflow-ops[wan]'). With weights that were trained to generate causally, chunk by chunk, `tiny_pipeline` is
`WanPipeline.from_pretrained`, and `diffusers.utils.export_to_video(video[0], "story.mp4", fps=16)` writes the video.
"""

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from memflow_ops.integrations.diffusers import attach_memory

WORDS = ("<pad>", "</s>", "<unk>", "a", "ball", "box", "at", "the", "sea")


def tiny_pipeline() -> WanPipeline:
    """A pipeline of random weights, with the scheduler of the released few-step models."""
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text_encoder = UMT5Config(vocab_size=len(WORDS), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=32, ffn_dim=48, num_layers=2
    )
    pipe = WanPipeline(
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"),
        UMT5EncoderModel(text_encoder).eval(),
        AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval(),
        FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True),
        transformer.eval(),
    )
    return pipe


def main() -> np.ndarray:
    """Streams four chunks of two prompts; returns the video (1, frames, rows, columns, 3), from 0 to 1."""
    pipe, prompts = tiny_pipeline(), ["a ball"] * 2 + ["a box at the sea"] * 2
    memory = attach_memory(pipe.transformer, height=4, width=6, window_frames=6, bank_frames=2, block_size=4)
    video = memory.generate(pipe, prompts, sigmas=(1, 0.75, 0.5, 0.25), generator=torch.Generator().manual_seed(0))
    print(f"{len(prompts)} chunks, {video.shape[1]} frames of {video.shape[2]} x {video.shape[3]} pixels")
    return video


if __name__ == "__main__":
    main()
