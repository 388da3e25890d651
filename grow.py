"""Growth: a larger model that computes the same function.

ModelGrow (arXiv 2412.18966) continues the training of a video model after making it larger. At the moment of
growth nothing may be lost, so the grown network has to be the same function as the base, to the last bit; the
new parameters then learn what the old ones had no room for.

**Depth, by insert stacking** (figure 3). The stack of N blocks is cut into N / M groups of M blocks, and each
group is followed by P M / N copies of its last block:

    N = 4, M = 2, P = 2:    0 1 | 2 3    ->    0 1 1' | 2 3 3'

A copy starts with useful weights, but it must not act: x + gate * branch(x) is x if the gate is zero. So the
rows of the copy's adaLN map that produce gates are zeroed, weights **and biases**, and nothing else. Exactly
one factor of each branch is zero: the gate gets a gradient at once, because the branch behind it is alive,
and the rest of the copy follows one step later. (Were the output projection zeroed as well, neither would
ever get a gradient.)

What differs from the paper: it does not say which tensor is zeroed; the gate is the natural one here, since
adaLN-zero starts a model from scratch in the same way.

Left out so far: prefix and suffix stacking, growth in width, LoRA, the LLM branch, and optimiser state
carried along (a grown model starts with a fresh optimiser and a warm-up, which also suits a base whose
learning rate has decayed).
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dit import DiT, load_model, save_model


def insert_positions(depth: int, add: int, group: int) -> list[tuple[int, bool]]:
    """The grown stack of figure 3 as (block of the base, is it a new copy?), in order. `depth` N, `add` P,
    `group` M. Raises ValueError where N / M groups cannot share P copies evenly."""
    if add < 1 or group < 1 or depth % group or add % (depth // group):
        raise ValueError(
            f"cannot insert {add} blocks into {depth} in groups of {group}: "
            "the group must divide the depth, and the number of groups the blocks to add"
        )
    copies = add * group // depth
    plan = []
    for i in range(depth):
        plan.append((i, False))
        if (i + 1) % group == 0:
            plan += [(i, True)] * copies
    return plan


@torch.no_grad()
def grow_depth(model: DiT, add: int, group: int = 1) -> DiT:
    """A model with `add` more blocks, inserted after each `group` blocks of the base, that computes the same
    function, bit for bit (ModelGrow, figure 3, insert stacking). The base is left as it is.
    Raises ValueError where the blocks cannot be spread evenly."""
    plan = insert_positions(model.config.depth, add, group)
    grown = copy.deepcopy(model)
    grown.config = replace(model.config, depth=len(plan))
    grown.blocks = torch.nn.ModuleList(copy.deepcopy(model.blocks[i]) for i, _ in plan)
    for block, (_, new) in zip(grown.blocks, plan, strict=True):
        if new:
            for parameter in (block.adaln.weight, block.adaln.bias):
                parameter.unflatten(0, (-1, 3, model.config.width))[:, 2] = (
                    0  # the gate of (shift, scale, gate)
                )
    return grown


def main(argv=None):
    """Grow a checkpoint without training and prove that nothing changed: `python grow.py runs/base --depth
    insert`."""
    parser = argparse.ArgumentParser(
        description="Grow a checkpoint; prints the proof that it computes the same."
    )
    parser.add_argument("checkpoint", help="run or checkpoint to grow")
    parser.add_argument("--depth", choices=("insert",), required=True, help="where the new blocks go")
    parser.add_argument(
        "--add", type=int, help="blocks to add; as many as there are, which doubles the depth"
    )
    parser.add_argument(
        "--group", type=int, default=1, help="blocks per group, each followed by its copies (1)"
    )
    parser.add_argument("--out", help="directory for the grown checkpoint; without it nothing is written")
    args = parser.parse_args(argv)
    base, header = load_model(args.checkpoint)
    grown = grow_depth(base, args.add or base.config.depth, args.group)
    print("          blocks  parameters  GFLOPs per clip, forward")
    for name, model in (("base", base), ("grown", grown)):
        parameters = sum(p.numel() for p in model.parameters())
        print(
            f"{name:8}  {model.config.depth:6}  {parameters / 1e6:8.2f} M  {model.config.flops(16) / 1e9:.2f}"
        )
    for dtype in (torch.float64, torch.float32):
        print(f"max |difference| on random inputs, {str(dtype)[6:]}: {difference(base, grown, dtype):g}")
    if args.out:
        out = Path(args.out)
        if (out / "model.safetensors").exists():
            raise ValueError(f"{out} holds a checkpoint already: name another directory with --out")
        out.mkdir(parents=True, exist_ok=True)
        event = {"from": args.checkpoint, "grow": "depth", "depth": [base.config.depth, grown.config.depth]}
        save_model(
            out, grown.state_dict(), grown.config, **{**header, "history": [*header["history"], event]}
        )
        print(f"written to {out}")


@torch.no_grad()
def difference(a: DiT, b: DiT, dtype=torch.float64, batch: int = 2, text_length: int = 7) -> float:
    """The largest |a - b| over all outputs on random inputs; both models run in `dtype`."""
    c = a.config
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, c.frames, c.size, c.size, generator=generator, dtype=dtype)
    t = torch.rand(batch, generator=generator, dtype=dtype)
    text = torch.randn(batch, text_length, c.text_dim, generator=generator, dtype=dtype)
    mask = torch.arange(text_length) < torch.arange(text_length, text_length - batch, -1)[:, None]
    one, two = (copy.deepcopy(model).to(dtype)(x, t, text, mask) for model in (a, b))
    return (one - two).abs().max().item()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
