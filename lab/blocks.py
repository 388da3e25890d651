"""What each block of a model does: `python -m lab.blocks RUN`.

Growth inserts copies of blocks that do nothing yet (grow.py). Do they learn something of their own, and which
of them could go again? Two numbers of each block say so. Both are taken with the averaged weights (EMA) on
held-out clips of `rich`, at the fixed noise and timesteps of the validation loss:

    importance     1 - E[cos(input, output)] over all tokens (SANA-1.5, arXiv 2501.18427): how far the block
                   turns the residual stream; 0 if it does nothing
    removal cost   the validation loss without this block, minus that of the whole model

The first is cheap and looks at directions alone. The second is what counts, and needs one validation for each
block. The cosine is computed as half of the squared distance of the two unit vectors, which is 0 without
rounding if they are equal.

`--prune K` removes the K least important blocks, as SANA-1.5 does after growth, and says what that costs.

The JSON file of `--out` says whether the checkpoint is one before growth, at growth or after it, and which
blocks the last growth made. `python -m lab.study --report` draws what is in results/blocks/.

They come from these runs, with seeds 0, 1 and 2, and from the checkpoints that grow.py makes between the two;
after the last training `--prune 4` removes as many blocks as were added:

    ALL="--data rich --clips 4096 --batch 16 --decay 0 --ema 0.99 --seed 0"
    python train.py $ALL --preset nano --steps 700 --out BASE
    python train.py $ALL --from BASE --grow depth --where insert --steps 300     (and suffix)

Left out: training after pruning; importance by timestep.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from data import ToyDataset
from dit import DiT
from flow import loss_by_timestep, validation_batches
from grow import build_grown
from lab.study import find_revision, machine_name
from lab.tables import markdown_table
from machine import pick_device, run_command
from run import Checkpoint, load_model, save_checkpoint, write_atomically
from stacking import stacking_plan
from text_encoder import Prompts

CLIPS = 256


def remove_blocks(model: DiT, removed) -> DiT:
    """The model without the blocks whose numbers are in `removed`. Raises ValueError if none is left."""
    kept = [i for i in range(model.config.depth) if i not in removed]
    if not kept:
        raise ValueError(f"this model has {model.config.depth} blocks: one must stay")
    weights = {name: w for name, w in model.state_dict().items() if not name.startswith("blocks.")}
    for j, i in enumerate(kept):
        for name, weight in model.blocks[i].state_dict().items():
            weights[f"blocks.{j}.{name}"] = weight
    return build_grown(model, weights, depth=len(kept))


def turned(before, after):
    """1 - cos of two tensors (..., D), as half of the squared distance of the unit vectors -> (...,)."""
    difference = F.normalize(after.float(), dim=-1) - F.normalize(before.float(), dim=-1)
    return difference.square().sum(-1) / 2


@torch.no_grad()
def importance(model: DiT, batches) -> list[float]:
    """1 - E[cos(input, output)] of each block, over the tokens of all `flow.validation_batches`."""
    sums = [0.0] * model.config.depth

    def watch(i):
        def hook(_, inputs, output):
            sums[i] += turned(inputs[0], output).mean(1).sum().item()  # mean over the tokens

        return hook

    hooks = [block.register_forward_hook(watch(i)) for i, block in enumerate(model.blocks)]
    loss_by_timestep(model, batches)
    for hook in hooks:
        hook.remove()
    count = sum(len(batch[0]) for batch in batches)
    return [total / count for total in sums]


def loss_of(model: DiT, batches) -> float:
    """The validation loss, in float32."""
    return loss_by_timestep(model, batches).mean().item()


def removal_costs(model: DiT, batches, loss: float) -> list[float]:
    """The validation loss without each block, minus `loss`, that of the whole model."""
    return [loss_of(remove_blocks(model, {i}), batches) - loss for i in range(model.config.depth)]


def growth_of(metadata: dict, depth: int) -> dict:
    """From the history of a checkpoint: `when` ("before", "at growth" or "after"), `where` the blocks of the
    last growth in depth went ("" before), which blocks are new, and the seed of the last training."""
    when, where, seed, new = "before", "", None, [False] * depth
    for event in metadata["history"]:
        if event.get("grow") == "depth":
            when, where = "at growth", event["where"]
            plan = stacking_plan(event["changed"]["depth"][0], event["add"], event["group"], where)
            new = [is_copy for _, is_copy in plan]
        elif "train" in event:
            seed = event["seed"]
            when = "after" if where else "before"
    return {"when": when, "where": where, "new": new, "seed": seed}


def measure(model: DiT, metadata: dict, batches) -> dict:
    """All numbers of a checkpoint."""
    loss = loss_of(model, batches)
    return {
        **growth_of(metadata, model.config.depth),
        "history": metadata["history"],
        "flops": metadata["flops"],
        "loss": loss,
        "importance": importance(model, batches),
        "cost": removal_costs(model, batches, loss),
    }


def table(result: dict) -> str:
    """The blocks of a checkpoint, a row for each."""
    rows = []
    for i, new in enumerate(result["new"]):
        values = [f"{result['importance'][i]:.4f}", f"{result['cost'][i]:+.4f}"]
        rows.append([str(i), "new" if new else "old", *values])
    return markdown_table(["block", "", "importance", "removal cost"], rows)


def prune(model: DiT, metadata: dict, result: dict, count: int) -> tuple[DiT, dict]:
    """The model without its `count` least important blocks, and the metadata for its checkpoint."""
    order = sorted(range(model.config.depth), key=lambda i: result["importance"][i])
    removed = sorted(order[:count])
    pruned = remove_blocks(model, removed)
    changed = {"depth": [model.config.depth, pruned.config.depth]}
    event = {"grow": "prune", "changed": changed, "removed": removed}
    return pruned, {**metadata, "history": [*metadata["history"], event], "new": []}


def main(argv=None):
    """Print what each block does: `python -m lab.blocks runs/base`."""
    parser = argparse.ArgumentParser(description="What each block of a checkpoint does.")
    add = parser.add_argument
    add("checkpoint", help="run or checkpoint")
    add("--out", help="JSON file for the numbers (none)")
    add("--prune", type=int, metavar="K", help="remove the K least important blocks (none)")
    add("--out-run", help="with --prune: run directory for what is left (none)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    args = parser.parse_args(argv)
    if args.out_run and not args.prune:
        raise ValueError("--out-run is for --prune, which is not given")
    if args.prune is not None and args.prune < 1:
        raise ValueError(f"--prune is {args.prune}; it must be at least 1")
    if args.out_run and Path(args.out_run).exists():
        raise ValueError(f"{args.out_run} is there already: name another directory with --out-run")
    device = pick_device(args.device)
    model, metadata = load_model(args.checkpoint)
    model.to(device)
    config = model.config
    dataset = ToyDataset("rich", CLIPS, 1, config.frames, config.size, "detailed")
    prompts = Prompts(dataset.captions, metadata, config.llm_dim, device)
    batches = list(validation_batches(dataset, prompts, device))
    result = measure(model, metadata, batches)
    print(f"{args.checkpoint} ({result['when']}): loss {result['loss']:.4f}")
    print(table(result))
    if args.prune:
        pruned, metadata = prune(model, metadata, result, args.prune)
        removed, loss = metadata["history"][-1]["removed"], loss_of(pruned, batches)
        print(f"without blocks {', '.join(map(str, removed))}: loss {result['loss']:.4f} -> {loss:.4f}")
        result["pruned"] = {"removed": removed, "loss": loss}
    if args.out:
        source = {"revision": find_revision(), "machine": machine_name()}
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(args.out), json.dumps(result | source))
    if args.out_run:
        save_checkpoint(Path(args.out_run) / "checkpoint", Checkpoint(pruned, pruned, {}, metadata, {}))
        print(f"written to {args.out_run}")


if __name__ == "__main__":
    run_command(main, "take a smaller model")
