"""What training costs: floating-point operations, and the memory of a GPU. `python cost.py`

**FLOPs.** A model without data runs one step, and torch counts its matrix products and attention: two for
each multiplication, which comes with an addition. All else counts as nothing. A training step costs about
three forward passes. Gradients of inputs and of frozen weights are not computed and not counted. The study
compares models at equal FLOPs.

**Memory** is an estimate (docs/gpu.md compares it with measurements). A trained parameter takes 20 bytes:
weight, gradient, two moments and EMA, in float32. What the forward pass keeps for the backward pass is
counted by autograd's hooks, for a model that is not compiled. A compiled one keeps a tenth less.

Left out: the frozen text encoders, whose features are computed once; memory on a CPU; time.
"""

import functools

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from dit import PRESETS, DiT, DiTConfig, set_attention
from flow import VALIDATED, flow_loss
from machine import autocast, run_command


def empty_inputs(config: DiTConfig, batch: int, lengths):
    """Inputs of a training step on `batch` clips, with any content -> clips, timesteps, noise, and the prompt
    of each encoder, of `lengths` tokens."""
    x, noise = torch.empty(2, batch, 3, config.frames, config.size, config.size)
    prompt = []
    for length, dim in zip(lengths, (config.text_dim, config.llm_dim), strict=False):
        prompt += [torch.empty(batch, length, dim), torch.ones(batch, length, dtype=torch.bool)]
    return x, torch.empty(batch), noise, prompt


def count_flops(model: DiT, lengths, backward: bool = True) -> int:
    """Floating-point operations on one training clip with prompts of `lengths` tokens (one length per text
    encoder): of a forward pass, and with `backward` of a training step."""
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    return flops_of(model.config, tuple(lengths), trained, backward)


@functools.cache  # a count takes half a second
def flops_of(config: DiTConfig, lengths: tuple[int, ...], trained: tuple[bool, ...], backward: bool) -> int:
    """`count_flops` of a model of `config`; `trained` says of each parameter whether it needs a gradient."""
    with torch.device("meta"):
        ghost = DiT(config)
        inputs = empty_inputs(config, 1, lengths)
    for parameter, needs_gradient in zip(ghost.parameters(), trained, strict=True):
        parameter.requires_grad_(needs_gradient)
    with FlopCounterMode(display=False) as counter:
        loss = flow_loss(ghost, *inputs).sum()
        if backward:
            loss.backward()
    return counter.get_total_flops()


def held_bytes(model: DiT, batch: int, lengths, precision, recompute: bool) -> int:
    """Bytes that a forward pass on `batch` clips holds until the backward pass: inputs and saved tensors, but
    not the parameters. lengths: tokens of the prompts, for each encoder; recompute: blocks are computed again
    in the backward pass. Attention is torch's fused one."""
    held = []

    def hold(tensor):
        held.append(tensor.untyped_storage())
        return tensor

    with FakeTensorMode():  # on a CPU that is not there, which has autocast, unlike device "meta"
        ghost = DiT(model.config)
        ghost.checkpoint_activations = recompute
        set_attention(ghost, "sdpa")
        for mine, other in zip(ghost.parameters(), model.parameters(), strict=True):
            mine.requires_grad_(other.requires_grad)
        x, t, noise, prompt = empty_inputs(model.config, batch, lengths)
        for tensor in (x, t, noise, *prompt):
            hold(tensor)
        with saved_tensors_hooks(hold, lambda kept: kept), autocast(t.device, precision):
            flow_loss(ghost, x, t, noise, prompt)
        sizes = {storage._cdata: storage.nbytes() for storage in held}
        for parameter in ghost.parameters():
            sizes.pop(parameter.untyped_storage()._cdata, None)
    return sum(sizes.values())


def memory_needed(model: DiT, batch: int, lengths, precision, resident=0, shards=1) -> int:
    """About how many bytes of a GPU the training of `model` takes with `batch` clips at once. resident: of
    clips and features that lie there; shards: processes that share the state. Other arguments as for
    `held_bytes`."""
    config, recompute = model.config, model.checkpoint_activations
    state = sum(p.nbytes * (5 if p.requires_grad else 2) for p in model.parameters())
    held = held_bytes(model, batch, lengths, precision, recompute)
    if recompute:  # the inside of the block that is computed again
        held += (held_bytes(model, batch, lengths, precision, False) - held) // config.depth
    # A captured step keeps its memory, so validation needs more: x in float32 and, in 16 bits, its norm and
    # the hidden channels before and after the GELU.
    per_channel = 4 + 2 + 4 * config.mlp_ratio
    validation = VALIDATED * config.tokens() * config.width * per_channel
    return state // shards + held + validation + resident


def main():
    """A line per preset: size, costs, and the config."""
    print("preset  parameters  tokens  GFLOPs per clip, forward  GiB to train, batch 16")
    for name, config in PRESETS.items():
        with torch.device("meta"):
            model = DiT(config)
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        flops = count_flops(model, [16], backward=False) / 1e9
        memory = memory_needed(model, 16, [16], torch.bfloat16) / 2**30
        print(f"{name:6}  {parameters:8.1f} M  {config.tokens():6}  {flops:24.2f}  {memory:22.1f}  {config}")


if __name__ == "__main__":
    run_command(main)
