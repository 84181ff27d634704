"""The transformer against a forward pass written independently from Wan 2.1's description, and its properties."""

import math

import pytest
import torch
import torch._dynamo.utils
import torch.nn.functional as F

from memflow_ops import memory_attention
from memflow_ops.environment import why_not_compile
from memflow_ops.model.wan.transformer import CausalVideoModel, ModelConfig, sinusoid
from memflow_ops.ops import registration
from memflow_ops.rotary import rope_rotation

CONFIG = ModelConfig(
    dim=24, ffn_dim=40, num_heads=2, num_layers=2, in_dim=5, out_dim=3, text_dim=7, text_len=4, freq_dim=16
)
FRAMES, HEIGHT, WIDTH = 3, 6, 8
GRID = (3, 4)


def make_model(seed: int = 0) -> CausalVideoModel:
    torch.manual_seed(seed)
    model = CausalVideoModel(CONFIG).double()
    for parameter in model.parameters():  # norms' weights of 1 and biases of 0 would hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def inputs(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": normal(batch, 3, FRAMES, HEIGHT, WIDTH),
        "condition": normal(1, 2, FRAMES, HEIGHT, WIDTH),
        "t": torch.tensor([[1000.0, 1000.0, 1000.0], [0.0, 250.0, 937.5]])[:batch],
        "embeddings": normal(batch, 3, 7),
    }


def attention_within_chunk(model: CausalVideoModel, frames: torch.Tensor):
    def attend(layer, q, k, v):
        q, k = model.rotate(q, frames, GRID), model.rotate(k, frames, GRID)
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def forward(model: CausalVideoModel, given: dict[str, torch.Tensor], first_frame: int = 0) -> torch.Tensor:
    attend = attention_within_chunk(model, torch.arange(first_frame, first_frame + FRAMES))
    return model(given["x"], given["t"], model.encode_text(given["embeddings"]), attend, given["condition"])


def independent_forward(model: CausalVideoModel, given: dict[str, torch.Tensor], first_frame: int) -> torch.Tensor:
    """One sample at a time, with loops and complex numbers, from the state dict alone."""
    w = model.state_dict()
    dim, heads, head_dim = CONFIG.dim, CONFIG.num_heads, CONFIG.dim // CONFIG.num_heads

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def rms_norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def gelu(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(x):
        return x / (1 + torch.exp(-x))

    def softmax_attention(q, k, v):
        out = []
        for h in range(heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            out.append(torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(head_dim), -1) @ v[:, part])
        return torch.cat(out, -1)

    def rotated(x):
        spatial = 2 * (head_dim // 6)
        angles = []
        for frame in range(first_frame, first_frame + FRAMES):
            for row in range(GRID[0]):
                for column in range(GRID[1]):
                    token = []
                    for position, channels in ((frame, head_dim - 2 * spatial), (row, spatial), (column, spatial)):
                        token += [position * 10000 ** (-2 * i / channels) for i in range(channels // 2)]
                    angles.append(token)
        turn = torch.polar(torch.ones(1, dtype=torch.float64), torch.tensor(angles, dtype=torch.float64))
        pairs = torch.view_as_complex(x.reshape(len(x), heads, head_dim // 2, 2))
        return torch.view_as_real(pairs * turn[:, None]).reshape(x.shape)

    results = []
    for b in range(len(given["x"])):
        pixels = torch.cat([given["x"][b], given["condition"][0]])
        hidden = F.conv3d(pixels, w["patch_embedding.weight"], w["patch_embedding.bias"], stride=(1, 2, 2))
        hidden = hidden.flatten(1).T  # (tokens, dim)
        padded = torch.cat([given["embeddings"][b], torch.zeros(1, 7, dtype=torch.float64)])
        context = linear("text_embedding.2", gelu(linear("text_embedding.0", padded)))
        half = CONFIG.freq_dim // 2
        angles = given["t"][b].double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        waves = torch.cat([angles.cos(), angles.sin()], -1).float().double()
        embedding = linear("time_embedding.2", silu(linear("time_embedding.0", waves)))  # (frames, dim)
        time = linear("time_projection.1", silu(embedding)).reshape(FRAMES, 6, dim)
        frame_of_token = torch.arange(FRAMES).repeat_interleave(GRID[0] * GRID[1])
        for i in range(CONFIG.num_layers):
            block = f"blocks.{i}"
            shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (
                (w[f"{block}.modulation"][0, j] + time[:, j])[frame_of_token] for j in range(6)
            )
            h = layer_norm(hidden) * (1 + scale) + shift
            q = rotated(rms_norm(f"{block}.self_attn.norm_q", linear(f"{block}.self_attn.q", h)))
            k = rotated(rms_norm(f"{block}.self_attn.norm_k", linear(f"{block}.self_attn.k", h)))
            out = softmax_attention(q, k, linear(f"{block}.self_attn.v", h))
            hidden = hidden + gate * linear(f"{block}.self_attn.o", out)
            h = layer_norm(hidden) * w[f"{block}.norm3.weight"] + w[f"{block}.norm3.bias"]
            q = rms_norm(f"{block}.cross_attn.norm_q", linear(f"{block}.cross_attn.q", h))
            k = rms_norm(f"{block}.cross_attn.norm_k", linear(f"{block}.cross_attn.k", context))
            out = softmax_attention(q, k, linear(f"{block}.cross_attn.v", context))
            hidden = hidden + linear(f"{block}.cross_attn.o", out)
            h = layer_norm(hidden) * (1 + ffn_scale) + ffn_shift
            hidden = hidden + ffn_gate * linear(f"{block}.ffn.2", gelu(linear(f"{block}.ffn.0", h)))
        shift, scale = ((w["head.modulation"][0, j] + embedding)[frame_of_token] for j in range(2))
        y = linear("head.head", layer_norm(hidden) * (1 + scale) + shift)  # (tokens, 1 * 2 * 2 * 3)
        video = torch.zeros(3, FRAMES, HEIGHT, WIDTH, dtype=torch.float64)
        for token, values in enumerate(y):
            frame, rest = divmod(token, GRID[0] * GRID[1])
            row, column = divmod(rest, GRID[1])
            for p in range(2):
                for q_ in range(2):
                    video[:, frame, 2 * row + p, 2 * column + q_] = values[(p * 2 + q_) * 3 :][:3]
        results.append(video)
    return torch.stack(results)


@pytest.mark.parametrize("first_frame", [0, 5, 4096], ids="first{}".format)
def test_forward_equals_an_independent_one(first_frame):
    model, given = make_model(), inputs()
    expected = independent_forward(model, given, first_frame)
    # Norms and rotations are float32 by design, whatever the model's dtype.
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(forward(model, given, first_frame), expected, atol=2e-5, rtol=0)


def test_parameters_carry_wans_names():
    names = set(make_model().state_dict())
    assert {name for name in names if not name.startswith("blocks.1.")} == {
        *(f"{module}.{kind}" for kind in ("weight", "bias") for module in ("patch_embedding", "head.head")),
        *(
            f"{m}.{i}.{kind}"
            for kind in ("weight", "bias")
            for m in ("text_embedding", "time_embedding")
            for i in (0, 2)
        ),
        *(f"{m}.{kind}" for kind in ("weight", "bias") for m in ("time_projection.1", "blocks.0.norm3")),
        *(f"blocks.0.ffn.{i}.{kind}" for kind in ("weight", "bias") for i in (0, 2)),
        *(f"blocks.0.{a}_attn.{p}.{kind}" for a in ("self", "cross") for p in "qkvo" for kind in ("weight", "bias")),
        *(f"blocks.0.{a}_attn.norm_{p}.weight" for a in ("self", "cross") for p in "qk"),
        "blocks.0.modulation",
        "head.modulation",
    }


def test_rope_depends_on_distance_alone_at_any_index():
    model = make_model()
    generator = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 1, 12, 2, 12, generator=generator)

    def scores(query_frame: int, key_frame: int) -> torch.Tensor:
        rotated_q = model.rotate(q, torch.tensor([query_frame]), GRID)
        rotated_k = model.rotate(k, torch.tensor([key_frame]), GRID)
        return torch.einsum("bqhd,bkhd->bhqk", rotated_q, rotated_k)

    expected = scores(21, 0)
    for offset in (7, 1024, 100_000):
        torch.testing.assert_close(scores(21 + offset, offset), expected, atol=2e-5, rtol=0)
    assert (scores(22, 0) - expected).abs().max() > 0.1


def test_rope_angles_far_beyond_any_table():
    cosines, sines = rope_rotation(12, torch.tensor([1_000_003]), torch.tensor([2]), torch.tensor([3]))
    time = [1_000_003 * 10_000.0 ** (-2 * i / 4) for i in range(2)]
    angles = torch.tensor([*time, 2, 2 * 10_000.0**-0.5, 3, 3 * 10_000.0**-0.5], dtype=torch.float64)
    assert cosines.shape == (1, 1, 1, 6)
    torch.testing.assert_close(cosines[0, 0, 0].double(), angles.cos(), atol=1e-7, rtol=0)
    torch.testing.assert_close(sines[0, 0, 0].double(), angles.sin(), atol=1e-7, rtol=0)


def test_rotate_takes_frames_per_batch_entry():
    model = make_model()
    x = torch.randn(2, 24, 2, 12, generator=torch.Generator().manual_seed(4))
    frames = torch.tensor([[3, 9], [40, 2000]])
    together = model.rotate(x, frames, GRID)
    for b in range(2):
        torch.testing.assert_close(together[b : b + 1], model.rotate(x[b : b + 1], frames[b], GRID), atol=0, rtol=0)
    torch.testing.assert_close(together.norm(dim=-1), x.norm(dim=-1))  # a rotation keeps lengths
    assert model.rotate(x.bfloat16(), frames, GRID).dtype == torch.bfloat16


def test_sinusoid_is_computed_in_float64():
    t = torch.tensor([937.5])
    angles = 937.5 * 10_000.0 ** (-torch.arange(128, dtype=torch.float64) / 128)
    expected = torch.cat([angles.cos(), angles.sin()])
    torch.testing.assert_close(sinusoid(t, 256)[0].double(), expected, atol=6e-8, rtol=0)


def test_timestep_of_a_frame_acts_on_that_frame():
    """With attention cut off between frames, changing one frame's timestep changes that frame and no other."""
    model, given = make_model(), inputs()

    def run(t: torch.Tensor) -> torch.Tensor:
        text = model.encode_text(given["embeddings"])
        return model(given["x"], t, text, lambda layer, q, k, v: v, given["condition"])

    changed = given["t"].clone()
    changed[:, 1] = 500.0
    difference = (run(changed) - run(given["t"])).abs().amax((0, 1, 3, 4))
    assert difference[1] > 1e-3
    assert difference[0] == difference[2] == 0


def test_batch_entries_do_not_mix():
    model, given = make_model(), inputs()
    both = forward(model, given)
    for b in range(2):
        alone = {name: value if name == "condition" else value[b : b + 1] for name, value in given.items()}
        torch.testing.assert_close(both[b : b + 1], forward(model, alone), atol=1e-6, rtol=0)


def test_attend_receives_unrotated_keys():
    """The keys handed over do not depend on where in the video the chunk stands."""
    model, given = make_model(), inputs()
    seen: list[torch.Tensor] = []

    def attend(layer, q, k, v):
        assert q.shape == k.shape == v.shape == (2, FRAMES * 12, 2, 12)
        seen.append(k)
        return torch.zeros_like(q)

    model(given["x"], given["t"], model.encode_text(given["embeddings"]), attend, given["condition"])
    assert len(seen) == CONFIG.num_layers
    h = F.layer_norm(
        model._patches(torch.cat([given["x"], given["condition"].expand(2, -1, -1, -1, -1)], 1), GRID, None), (24,)
    )
    waves = sinusoid(given["t"], CONFIG.freq_dim).double()
    time = model.time_projection(model.time_embedding(waves)).unflatten(-1, (6, -1)) + model.blocks[0].modulation
    h = h.unflatten(1, (FRAMES, -1)) * (1 + time[:, :, None, 1]) + time[:, :, None, 0]
    k = model.blocks[0].self_attn.k(h).flatten(1, 2)
    k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.blocks[0].self_attn.norm_k.weight
    torch.testing.assert_close(seen[0].flatten(2), k, atol=1e-4, rtol=0)  # norms are float32


def test_short_text_is_padded_with_zeros_before_the_text_mlp():
    model, given = make_model(), inputs()
    padded = torch.cat([given["embeddings"], torch.zeros(2, 1, 7, dtype=torch.float64)], 1)
    for short, long in zip(model.encode_text(given["embeddings"]), model.encode_text(padded), strict=True):
        assert short[0].shape == (2, CONFIG.text_len, 2, 12)
        for a, b in zip(short, long, strict=True):
            torch.testing.assert_close(a, b, atol=0, rtol=0)
    with pytest.raises(ValueError, match=r"up to 4, 7\), got \(2, 5, 7\)"):
        model.encode_text(torch.zeros(2, 5, 7))


def test_bad_input_is_named():
    model, given = make_model(), inputs()
    text = model.encode_text(given["embeddings"])
    with pytest.raises(ValueError, match="takes 5 channels, condition included, got 3"):
        model(given["x"], given["t"], text, lambda *a: a[1])
    with pytest.raises(ValueError, match="7 x 8 frame does not divide"):
        model.tokens(7, 8)
    with pytest.raises(ValueError, match="dim must be"):
        ModelConfig(**{**vars(CONFIG), "dim": 25})
    with pytest.raises(ValueError, match="patch_size"):
        ModelConfig(**{**vars(CONFIG), "patch_size": (2, 2, 2)})
    assert model.tokens(HEIGHT, WIDTH) == 12


# ---------------------------------------------------------------------------------------------------------- compiled


def compiled_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_blocks_are_compiled_once_for_a_shape(backend):
    """Two graphs, the part before attention to the past and that after it, serve all blocks, passes and texts."""
    if backend == "inductor" and why_not_compile(torch.device("cpu")):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(1)
    config = ModelConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=4, in_dim=2, out_dim=2, text_dim=4, text_len=3)
    plain, compiled = CausalVideoModel(config).eval(), CausalVideoModel(config).eval()
    compiled.load_state_dict(plain.state_dict())
    compiled.compile_blocks(backend)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    memory = torch.randn(2, 1, 40, 2, 16)

    def attend(layer, q, k, v):
        return memory_attention(q, k, v, *memory, frame_tokens=10, block_size=4, top_k=2 + layer, query_group=5)

    sizes = [(3, 4, 6), (3, 4, 6), (1, 8, 8)][: 3 if backend == "aot_eager" else 1]
    with torch.no_grad():
        for step, (frames, height, width) in enumerate(sizes):
            x, t = torch.randn(1, 2, frames, height, width), torch.full((1, 1), 100.0 * step)
            text = plain.encode_text(torch.randn(1, 3, 4))
            torch.testing.assert_close(compiled(x, t, text, attend), plain(x, t, text, attend), rtol=1e-4, atol=1e-5)
            compiled.forward_keys(x, t, text, attend)
            assert compiled_graphs() == (2 if step < 2 else 4)
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_block_with_our_attention_compiles_as_a_whole():
    """Our operators break no graph: they have fakes, and the cache may be written in between."""
    torch.manual_seed(1)
    config = ModelConfig(dim=32, ffn_dim=48, num_heads=2, num_layers=1, in_dim=2, out_dim=2, text_dim=4, text_len=3)
    model = CausalVideoModel(config).eval()
    block, memory = model.blocks[0], torch.randn(2, 1, 40, 2, 16)
    pool, places = torch.zeros(1, 5, 10, 2, 16), torch.tensor([[3, 1]], dtype=torch.int32)

    def attend(layer, q, k, v):
        registration.write_frames(pool, places, k.unflatten(1, (2, 10)))
        return memory_attention(
            q, pool.flatten(1, 2), pool.flatten(1, 2), *memory, frame_tokens=10, block_size=4, top_k=2
        )

    with torch.no_grad():
        x, time = torch.randn(1, 20, 32), torch.randn(1, 1, 6, 32)
        (text,) = model.encode_text(torch.randn(1, 3, 4))
        want = block(x, time, text, 0, attend)
        kept = pool.clone()
        pool.zero_()
        whole = torch.compile(lambda *given: block(*given, 0, attend), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x, time, text), want)
        assert torch.equal(pool, kept) and pool[:, 1].abs().sum() > 0
