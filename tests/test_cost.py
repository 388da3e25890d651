"""What training costs: FLOPs against formulas, and memory against a real forward pass and measurements."""

import copy
from dataclasses import replace

import pytest
import torch

import cost
import dit
import machine
from conftest import SMALL, random_inputs, random_model
from cost import count_flops, held_bytes, memory_needed
from dit import PRESETS, DiT, set_attention
from flow import flow_loss

# --------------------------------------------------------------------------------------------------------
# FLOPs


def linear_maps(config, lengths):
    """-> (tokens, channels in, channels out, whether it is in a block and may have an adapter) of every
    linear map of the network, for one clip."""
    N, D = config.tokens(), config.width
    hidden = config.mlp_ratio * D
    maps = [(N, config.patch_dim, D, False), (1, dit.TIME_DIM, D, False), (1, D, D, False)]
    for length, dim in zip(lengths, (config.text_dim, config.llm_dim), strict=False):
        maps += [(length, dim, D, False), (length, D, D, False)]
    for _ in range(config.depth):
        maps += [(1, D, 9 * D, False), (N, D, 3 * D, True), (N, D, D, True)]  # adaLN, self-attention
        for i, length in enumerate(lengths):  # cross-attention; that to the LLM has an adaLN of its own
            maps += [(N, D, D, True), (length, D, 2 * D, True), (N, D, D, True)]
            maps += [(1, D, 3 * D, False)] * (i == 1)
        maps += [(N, D, hidden, True), (N, hidden, D, True)]
    return [*maps, (1, D, 2 * D, False), (N, D, config.patch_dim, False)]


def forward_flops(config, lengths):
    """Two for each multiplication, in linear maps with their adapters, in q k^T and in weights times v."""
    N, D = config.tokens(), config.width
    total = config.depth * 2 * 2 * N * N * D
    for length in lengths:
        total += config.depth * 2 * 2 * N * length * D
    for tokens, width_in, width_out, adapted in linear_maps(config, lengths):
        total += 2 * tokens * width_in * width_out
        if adapted:
            total += 2 * tokens * config.lora_rank * (width_in + width_out)
    return total


@pytest.mark.parametrize(
    "config, lengths",
    [
        (SMALL, [5]),
        (replace(SMALL, llm_dim=10, depth=2), [5, 7]),
        (replace(SMALL, lora_rank=3), [5]),
        (PRESETS["nano"], [16]),
    ],
)
def test_flops_against_formulas(config, lengths):
    with torch.device("meta"):
        model = DiT(config)
    assert count_flops(model, lengths, backward=False) == forward_flops(config, lengths)


def test_flops_of_training():
    """The backward pass costs twice the forward, without the gradients that nobody needs: those of inputs
    and of frozen weights."""
    N, D, hidden = SMALL.tokens(), SMALL.width, SMALL.width * SMALL.mlp_ratio
    model = random_model()
    inputs = 2 * (N * SMALL.patch_dim * D + 5 * SMALL.text_dim * D + dit.TIME_DIM * D)
    whole = 3 * forward_flops(SMALL, [5]) - inputs
    assert count_flops(model, [5]) == whole
    before = copy.deepcopy(model.state_dict())
    for block in model.blocks[1:]:
        block.mlp.requires_grad_(False)
    assert count_flops(model, [5]) == whole - 2 * (2 * N * 2 * D * hidden)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


# --------------------------------------------------------------------------------------------------------
# Memory


def bytes_by_hand(model, batch, lengths, precision):
    """What a real forward pass holds: all distinct memory that autograd saves, but the weights."""
    inputs = random_inputs(model.config, batch, lengths[0])
    noise = torch.randn_like(inputs[0])
    prompt = [*inputs[2:]]
    for length in lengths[1:]:
        prompt += [torch.randn(batch, length, model.config.llm_dim), torch.ones(batch, length).bool()]
    saved = [inputs[0], noise, inputs[1], *prompt]

    def pack(tensor):
        saved.append(tensor)
        return tensor

    set_attention(model, "sdpa")
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, machine.autocast(torch.device("cpu"), precision):
        flow_loss(model, inputs[0], inputs[1], noise, prompt)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    places = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    return sum(size for place, size in places.items() if place not in weights)


@pytest.mark.parametrize("precision", [torch.bfloat16, None])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("llm_dim, frozen", [(0, False), (10, True)])
def test_bytes_held_are_those_of_a_real_forward_pass(precision, again, llm_dim, frozen):
    model = DiT(replace(SMALL, llm_dim=llm_dim))
    model.checkpoint_activations = again
    if frozen:
        model.blocks[0].requires_grad_(False)
    lengths = [5, 7] if llm_dim else [5]
    expected = bytes_by_hand(model, 3, lengths, precision)
    assert held_bytes(model, 3, lengths, precision, again) == expected


@pytest.mark.parametrize("preset, batch, measured", [("small", 32, 17.8), ("base", 16, 19.5)])
def test_memory_is_about_what_was_measured(preset, batch, measured):
    """GiB on an H200, compiled, without EMA and validation (`python -m lab.bench train`)."""
    with torch.device("meta"):
        model = DiT(PRESETS[preset])
    state = 16 * sum(parameter.numel() for parameter in model.parameters())
    estimate = state + held_bytes(model, batch, [32], torch.bfloat16, recompute=False)
    assert estimate / 2**30 == pytest.approx(measured, rel=0.2)


def test_memory_of_state_and_of_blocks_computed_again():
    """20 bytes for a trained parameter, 8 for a frozen one; of blocks computed again one is held inside."""

    def needed(model, **options):
        return memory_needed(model, 2, [5], None, **options)

    model = DiT(SMALL)
    total = sum(parameter.numel() for parameter in model.parameters())
    state = needed(model) - needed(model, shards=20 * total)
    assert state == 20 * total - 1
    assert needed(model, resident=1000) == needed(model) + 1000
    frozen = DiT(SMALL).requires_grad_(False)
    assert needed(frozen) - needed(frozen, shards=8 * total) == 8 * total - 1
    model.checkpoint_activations = True
    outside, inside = (held_bytes(model, 2, [5], None, again) for again in (True, False))
    again = needed(model)
    model.checkpoint_activations = False
    assert needed(model) - again == pytest.approx((inside - outside) * 2 / 3, abs=1)  # of 3 blocks


def test_every_preset_is_printed(capsys):
    cost.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["preset", *PRESETS]
    tiny = lines[2].split()
    assert (tiny[3], PRESETS["tiny"].tokens()) == ("128", 128)  # 2 x 8 x 8
    assert float(tiny[4]) == round(forward_flops(PRESETS["tiny"], [16]) / 1e9, 2)
    small = lines[3].split()
    needed = memory_needed(DiT(PRESETS["small"]), 16, [16], torch.bfloat16)
    assert float(small[5]) == round(needed / 2**30, 1)
