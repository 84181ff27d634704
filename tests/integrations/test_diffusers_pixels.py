"""From a WanPipeline to pixels: `generate` is the loop by hand, and its first chunk what the pipeline itself makes."""

import numpy as np
import pytest
import torch

from memflow_ops.integrations.diffusers import attach_memory

HEIGHT, WIDTH = 4, 6
SIZES = {
    "height": HEIGHT, "width": WIDTH, "window_frames": 6, "bank_frames": 1, "device_frames": 4, "block_size": 4,
}  # fmt: skip
PROMPTS = ["a ball", "a ball", "a star", "a ball"]
FEW = {"sigmas": (1, 0.75, 0.5, 0.25)}


def few_steps():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=5.0, stochastic_sampling=True)


def many_steps():
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


@pytest.fixture
def pipe(pipeline):
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

    pipe = WanPipeline(
        PreTrainedTokenizerFast.from_pretrained(pipeline / "tokenizer"),
        UMT5EncoderModel.from_pretrained(pipeline / "text_encoder").eval(),
        AutoencoderKLWan.from_pretrained(pipeline / "vae").eval(),
        few_steps(),
        WanTransformer3DModel.from_pretrained(pipeline / "transformer").eval(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def by_hand(pipe, memory, steps, generator):
    chunks = []
    for prompt in PROMPTS:
        text = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=16)[0]
        memory.begin_chunk(text)
        x = torch.randn(1, 16, 3, HEIGHT, WIDTH, generator=generator)
        pipe.scheduler.set_timesteps(**steps)
        extra = {"generator": generator} if "sigmas" in steps else {}
        for t in pipe.scheduler.timesteps:
            x = pipe.scheduler.step(pipe.transformer(x, t[None], text).sample, t, x, **extra).prev_sample
        with memory.clean():
            pipe.transformer(x, torch.zeros(1), text)
        memory.commit()
        chunks.append(x)
    latents = torch.cat(chunks, 2)
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    return latents, pipe.video_processor.postprocess_video(pipe.vae.decode(latents * std + mean).sample, "np")


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [(few_steps, {"sigmas": [1, 0.75, 0.5, 0.25]}), (many_steps, {"num_inference_steps": 6})],
    ids=["few steps", "many steps"],
)
def test_generate_is_the_loop_by_hand(pipe, scheduler, steps):
    pipe.scheduler = scheduler()
    memory = attach_memory(pipe.transformer, **SIZES)
    latents, video = by_hand(pipe, memory, steps, torch.Generator().manual_seed(0))
    options = {**steps, "max_sequence_length": 16}
    got = memory.generate(pipe, PROMPTS, generator=torch.Generator().manual_seed(0), output_type="latent", **options)
    assert (got - latents).abs().max() <= 1e-5 * latents.abs().max()
    pixels = memory.generate(pipe, PROMPTS, generator=torch.Generator().manual_seed(0), **options)
    assert pixels.shape == (1, 45, HEIGHT * 8, WIDTH * 8, 3)
    assert np.abs(pixels - video).max() <= 1e-4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_first_chunk_is_what_the_pipeline_makes(pipe, guidance):
    pipe.scheduler = many_steps()
    expected = pipe(
        "a ball", negative_prompt="night", height=HEIGHT * 8, width=WIDTH * 8, num_frames=9, num_inference_steps=3,
        guidance_scale=guidance, generator=torch.Generator().manual_seed(0),
    ).frames  # fmt: skip
    memory = attach_memory(pipe.transformer, **SIZES, batch=2 if guidance > 1 else 1)
    got = memory.generate(
        pipe, ["a ball"], negative_prompt="night", num_inference_steps=3, guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert np.abs(got - expected).max() <= 1e-4


def test_chunks_come_one_by_one_for_several_stories(pipe):
    memory = attach_memory(pipe.transformer, **SIZES, batch=2)
    prompts = [("a ball", "a box"), ("a star", "a box")]
    chunks = memory.stream(pipe, prompts, output_type="pt", generator=torch.Generator().manual_seed(0), **FEW)
    first = next(chunks)
    assert memory.cache.committed == 1
    second = next(chunks)
    assert first.shape == (2, 9, 3, HEIGHT * 8, WIDTH * 8) and second.shape == (2, 12, 3, HEIGHT * 8, WIDTH * 8)
    whole = memory.generate(pipe, prompts, output_type="pt", generator=torch.Generator().manual_seed(0), **FEW)
    assert torch.equal(torch.cat([first, second], 1), whole)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_generate_passes_the_window_again_where_a_prompt_changes(pipe, guidance, monkeypatch):
    sizes = {**SIZES, "window_frames": 9}
    memory = attach_memory(pipe.transformer, **sizes, batch=4 if guidance > 1 else 2)
    prompts = [("a ball", "a box")] * 3 + [("a star", "a box")] * 2
    options = {**FEW, "guidance_scale": guidance, "output_type": "latent"}
    asked, begin = [], memory.begin_chunk

    def begin_chunk(text, **switch):
        asked.append(switch)
        return begin(text, **switch)

    monkeypatch.setattr(memory, "begin_chunk", begin_chunk)
    plain, got = (
        memory.generate(pipe, prompts, generator=torch.Generator().manual_seed(0), recache=recache, **options)
        for recache in (False, True)
    )
    assert asked[:8] == [{}] * 8 and asked[9] == {}
    expected = torch.cat([got[:, :, 3:9]] * (2 if guidance > 1 else 1))
    assert torch.equal(asked[8]["recache"], expected)
    assert asked[8]["switched"] == [True, False, *[False] * (2 if guidance > 1 else 0)]
    assert torch.equal(got[:, :, :9], plain[:, :, :9])
    assert (got - plain)[0, :, 9:].abs().max() > 1e-4
    assert (got - plain)[1].abs().max() <= 1e-5


def test_a_chunk_that_fails_is_given_up(pipe):
    memory = attach_memory(pipe.transformer, **SIZES)
    chunks = memory.stream(pipe, PROMPTS, **FEW)
    next(chunks)

    def fail(*_):
        raise KeyboardInterrupt

    hook = pipe.transformer.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        next(chunks)
    hook.remove()
    assert not memory.is_open and memory.cache.committed == 1


def test_what_does_not_fit_is_refused_before_anything_runs(pipe):
    from diffusers import WanTransformer3DModel

    memory = attach_memory(pipe.transformer, **SIZES)
    other = attach_memory(WanTransformer3DModel.from_config(pipe.transformer.config), **SIZES)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    pipe.text_encoder.register_forward_pre_hook(count)
    for of, prompts, options, said in (
        (memory, "a ball", {}, "list with an entry per chunk"),
        (memory, [], {}, "list with an entry per chunk"),
        (memory, ["a ball", ["a", "b"]], {}, "as many prompts in every chunk"),
        (memory, [("a", "b")], {}, "batch=2, got batch=1"),
        (memory, ["a ball"], {"guidance_scale": 5.0}, "batch=2, got batch=1"),
        (memory, ["a ball"], {"num_inference_steps": 0}, "at least 1"),
        (memory, ["a ball"], {"output_type": "gif"}, "output_type must be one of"),
        (other, ["a ball"], {}, "not attached to the pipeline's transformer"),
    ):
        for call in (of.generate, of.stream):
            with pytest.raises(ValueError, match=said):
                call(pipe, prompts, **options)
    pipe.transformer_2 = pipe.transformer
    with pytest.raises(ValueError, match="second transformer"):
        memory.generate(pipe, ["a ball"])
    assert not calls and not memory.cache.committed
