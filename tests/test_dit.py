"""The network: its parts against formulas written out here, its types, what it refuses.

What the network promises as a whole (every input matters, padding is invisible, a new model predicts grey)
is in test_all.py.
"""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dit
from attention import BACKENDS
from conftest import SMALL, random_inputs, random_model
from dit import DiT

# --------------------------------------------------------------------------------------------------------
# Tokens and positions


def test_patches_keep_pixels_together():
    x = torch.randn(2, 3, 6, 8, 12)
    tokens, grid = dit.patchify(x, SMALL)
    assert grid == (3, 2, 3) and tokens.shape == (2, 18, 96)
    assert torch.equal(dit.unpatchify(tokens, SMALL, grid), x)
    patch = tokens[1, 1 * 6 + 1 * 3 + 2].view(3, 2, 4, 4)  # the order of tokens is t, y, x
    assert torch.equal(patch, x[1, :, 2:4, 4:8, 8:12])


@pytest.mark.parametrize(
    "shape, message", [((5, 8, 8), "frames is 5"), ((4, 9, 8), "size is 9"), ((4, 8, 10), "size is 10")]
)
def test_clips_that_patches_do_not_fill_are_refused(shape, message):
    with pytest.raises(ValueError, match=f"{message}; this model needs a positive multiple of"):
        dit.patchify(torch.zeros(1, 3, *shape), SMALL)


def test_positions_are_in_the_order_of_tokens():
    t, y, x = torch.meshgrid(torch.arange(6.0), torch.arange(8.0), torch.arange(12.0), indexing="ij")
    tokens, grid = dit.patchify(torch.stack([t, y, x])[None], SMALL)
    corner = tokens.view(18, 3, -1).amin(2)  # of each patch, in pixels
    assert torch.equal(corner / torch.tensor([2.0, 4, 4]), dit.grid_positions(*grid, "cpu"))


def test_sines_and_cosines_against_loops():
    positions = torch.tensor([0.0, 1.5, 7.0])
    out = dit.sincos(positions, 7, 100.0)  # the channel that is left over is zero
    for i, position in enumerate(positions.tolist()):
        angles = [position * 100.0 ** (-k / 3) for k in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles] + [0.0]
        assert out[i].tolist() == pytest.approx(expected, abs=1e-6)


def test_every_axis_has_its_channels():
    """A step along one axis changes the channels of that axis alone, and each channel belongs to an axis."""
    place = torch.tensor([[2.0, 3.0, 4.0]])
    for embed, shares in (
        (dit.position_embedding, (12, 10, 10)),
        (lambda p, n: torch.cat(dit.rope_cos_sin(p, n), -1), (8, 12, 12)),
    ):
        changed = []
        for axis in range(3):
            moved = place.clone()
            moved[0, axis] += 1
            changed.append(embed(moved, 32)[0] != embed(place, 32)[0])
        assert [int(mask.sum()) for mask in changed] == list(shares)
        assert (torch.stack(changed).sum(0) == 1).all()


def test_frequencies_of_the_rotary_embedding():
    """Position p turns pair k of n by p / 100^(k / n), with a part of the pairs for each axis."""
    cos, sin = dit.rope_cos_sin(torch.tensor([[3.0, 5.0, 7.0]]), 32)
    angles = [p * 100.0 ** (-k / n) for p, n in ((3, 4), (5, 6), (7, 6)) for k in range(n)]
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-5)
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-5)


def test_rotation_is_a_product_of_complex_numbers():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 8, generator=g, dtype=torch.float64)
    angle = torch.randn(5, 4, generator=g, dtype=torch.float64)
    turned = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], -1)
    assert torch.allclose(dit.rotate(x, angle.cos(), angle.sin()), expected, atol=1e-12)


# --------------------------------------------------------------------------------------------------------
# The network against formulas


def normed(x):
    """LayerNorm without parameters."""
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()


def heads_of(x):
    """(N, D) -> (heads, N, d)."""
    return x.view(len(x), SMALL.heads, -1).transpose(0, 1)


def rms(x):
    """RMSNorm without parameters."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def turned(x, cos, sin):
    """Rotary positions, on x (heads, N, d)."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def averaged(q, k, v):
    """softmax(q k^T / sqrt(d)) v, with the heads side by side: (heads, N, d) -> (N, D)."""
    weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(0, 1).flatten(1)


def cross(layer, x, context):
    """Cross-attention written out: x (N, D), context (L, D) -> (N, D)."""
    k, v = layer.kv(context).chunk(2, -1)
    return layer.proj(averaged(rms(heads_of(layer.q(x))), rms(heads_of(k)), heads_of(v)))


@torch.no_grad()
def block_by_hand(block, x, c, rope, text, llm):
    """`Block.forward` for one clip: x (N, D), c (D,), text and llm (L, D) -> (N, D)."""
    rows = block.adaln(c).view(3, 3, -1)  # (attn, cross, mlp) x (shift, scale, gate) x D
    shift, scale, gate = rows[0]
    q, k, v = block.attn.qkv(normed(x) * (1 + scale) + shift).chunk(3, -1)
    q, k = (turned(rms(heads_of(part)), *rope) for part in (q, k))
    x = x + gate * block.attn.proj(averaged(q, k, heads_of(v)))
    shift, scale, gate = rows[1]
    x = x + gate * cross(block.cross, normed(x) * (1 + scale) + shift, text)
    shift, scale, gate = block.adaln_llm(c).view(3, -1)
    x = x + gate * cross(block.cross_llm, normed(x) * (1 + scale) + shift, llm)
    shift, scale, gate = rows[2]
    up = block.mlp.up(normed(x) * (1 + scale) + shift)
    return x + gate * block.mlp.down(up * (1 + torch.erf(up / 2**0.5)) / 2)


def token_positions(config):
    """-> (N, 3): time, height and width of each patch, counted with loops."""
    places = []
    for t in range(config.frames // config.patch_time):
        for y in range(config.size // config.patch_size):
            for x in range(config.size // config.patch_size):
                places.append((t, y, x))
    return torch.tensor(places, dtype=torch.float32)


@torch.no_grad()
def network_by_hand(model, x, t, text, llm):
    """`DiT.forward` for one clip x (3, T, H, W), without masks -> tokens of the predicted clip."""
    config, places = model.config, token_positions(model.config)
    tokens, _ = dit.patchify(x[None], config)
    absolute = dit.position_embedding(places, config.head_dim)  # the same for each head
    h = model.patch_embed(tokens[0]) + torch.cat([absolute] * config.heads, -1)
    angles = 1000 * t * 10_000 ** (-torch.arange(64) / 64)
    embedded = model.time_embed(torch.cat([angles.cos(), angles.sin()]).double())
    c = embedded / (1 + torch.exp(-embedded))  # SiLU
    text = normed(model.text_embed(normed(text)))
    llm = normed(model.llm_embed(normed(llm)))
    for block in model.blocks:
        h = block_by_hand(block, h, c, dit.rope_cos_sin(places, config.head_dim), text, llm)
    shift, scale = model.final_adaln(c).chunk(2)
    return model.final(normed(h) * (1 + scale) + shift)


def test_network_against_formulas():
    config = replace(SMALL, llm_dim=10)
    model = random_model(config, dtype=torch.float64)
    x, t, text, _ = random_inputs(dtype=torch.float64)
    llm = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masks = [torch.ones(2, length, dtype=torch.bool) for length in (5, 7)]
    out, _ = dit.patchify(model(x, t, text, masks[0], llm, masks[1]), config)
    for i in range(2):
        expected = network_by_hand(model, x[i], t[i], text[i], llm[i])
        assert torch.allclose(out[i], expected, atol=1e-6)  # positions and timesteps are float32
    assert out.std() > 0.1


def test_an_adapter_adds_a_product_of_two_matrices():
    layer = dit.LoRALinear(6, 4, 2).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(3, 6, dtype=torch.float64)
    whole = layer.weight + layer.lora_b @ layer.lora_a
    assert torch.allclose(layer(x), x @ whole.T + layer.bias, atol=1e-12)
    assert dit.LoRALinear(6, 4).lora_a is None


# --------------------------------------------------------------------------------------------------------
# The network: shapes, types, backends, initialization


def test_any_number_of_frames_and_any_size():
    model = random_model()
    _, t, text, mask = random_inputs()
    assert model(torch.randn(2, 3, 8, 24, 24), t, text, mask).shape == (2, 3, 8, 24, 24)
    for shape, message in (((3, 16, 16), "frames is 3"), ((4, 16, 18), "size is 18")):
        with pytest.raises(ValueError, match=message):
            model(torch.randn(2, 3, *shape), t, text, mask)


def test_features_of_an_llm_are_for_models_with_an_llm_branch():
    with_branch, without = random_model(replace(SMALL, llm_dim=10)), random_model()
    inputs = random_inputs()
    llm = torch.randn(2, 6, 10), torch.ones(2, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="llm_dim 10; llm was not given"):
        with_branch(*inputs)
    with pytest.raises(ValueError, match="llm_dim 0; llm was given"):
        without(*inputs, *llm)


def test_recomputed_activations_give_the_same_gradients():
    plain, saving = random_model(), random_model()
    saving.checkpoint_activations = True
    for model in (plain, saving):
        model(*random_inputs()).square().mean().backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_types_under_autocast():
    """Products in bfloat16, the residual stream in float32."""
    seen = []
    model = random_model()
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, out: seen.append((inputs[1].dtype, out.dtype)))
        block.mlp.register_forward_hook(lambda mlp, inputs, out: seen.append((inputs[0].dtype, out.dtype)))
    inputs = random_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs)
    branch, stream = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)
    assert seen == [branch, stream] * SMALL.depth
    truth = model(*inputs)
    assert 0 < (out.float() - truth).norm() < 0.05 * truth.norm()
    assert model.double()(*random_inputs(dtype=torch.float64)).dtype == torch.float64


def test_set_attention_reaches_every_attention(monkeypatch):
    seen = []

    def spy(q, k, v, mask=None, backend="auto"):
        seen.append(backend)
        return torch.zeros_like(q)

    monkeypatch.setattr(dit, "attention", spy)
    model = random_model(replace(SMALL, llm_dim=10))
    llm = torch.randn(2, 6, 10), torch.ones(2, 6, dtype=torch.bool)
    for backend in BACKENDS:
        dit.set_attention(model, backend)
        model(*random_inputs(), *llm)
        assert seen == [backend] * 3 * SMALL.depth
        seen.clear()


def test_a_parameter_without_a_rule_is_refused():
    model = DiT(SMALL)
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="no rule to initialize scale"):
        model.initialize()


def test_what_is_zero_at_the_start():
    """Gates and the output; of adapters the second matrix. Output projections are not: a branch with two zero
    factors would never learn."""
    model = DiT(replace(SMALL, llm_dim=10, lora_rank=2))
    for name, parameter in model.named_parameters():
        zero = name.endswith(("bias", "lora_b")) or "adaln" in name or name == "final.weight"
        assert bool((parameter == 0).all()) == zero, name
    weight = model.blocks[0].mlp.up.weight
    bound = math.sqrt(6 / sum(weight.shape))  # Xavier, uniform
    assert 0.9 * bound < weight.abs().max() <= bound


def test_weights_begin_uniform_within_the_bounds_of_xavier():
    for name, p in DiT(replace(SMALL, llm_dim=10, lora_rank=2)).named_parameters():
        if p.any():
            bound = math.sqrt(6 / sum(p.shape))
            assert 0.8 * bound < p.abs().max() <= bound, name


# --------------------------------------------------------------------------------------------------------
# Configuration


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"width": 25}, "width 25 must be an even multiple of heads 2"),
        ({"heads": 24}, "width 24 must be an even multiple of heads 24"),
        ({"depth": 0}, "depth is 0"),
        ({"depth": 1025}, "depth is 1025"),
        ({"width": 65537}, "width is 65537; it must be an integer from 1 to 65536"),
        ({"size": 18}, "size is 18; this model needs a positive multiple of 4"),
        ({"frames": True}, "frames is True"),
        ({"width": 24.0}, "width is 24.0"),
        ({"llm_dim": -1}, "llm_dim is -1"),
        ({"size": 65536}, "more pixels than a clip may have"),
    ],
)
def test_impossible_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **wrong)


def test_the_network_needs_neither_data_nor_transformers():
    code = "import sys, dit; print(*sorted({'transformers', 'data', 'train'} & set(sys.modules)))"
    here = Path(dit.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
