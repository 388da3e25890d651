"""Growth: a larger model that computes the same function.

ModelGrow (arXiv 2412.18966) makes a trained video model larger and continues its training. Growth must lose
nothing, so it is function-preserving (Net2Net, arXiv 1511.05641): the grown model computes what the base
computed. Training then teaches the new parameters. An operator takes a model and returns a new one:

    grow_depth        more blocks: zero-initialized copies                         the same bits
    grow_width        more channels and heads: duplicates that share the work      the same up to rounding
    grow_mlp          more hidden neurons: duplicates that share the work          the same up to rounding
    grow_llm          a second cross-attention in every block, with a zero gate    the same bits
    grow_resolution   more frames and pixels: positions are formulas               the same bits on old sizes
    grow_patch        more pixels, in as many patches                              the enlarged output
    add_lora          zero-initialized low-rank adapters beside frozen weights     the same bits
    merge_lora        the product of the adapters added to the weights             the same up to rounding

**Depth** (figure 3). P copies of blocks are added to a stack of N blocks. *Insert*: the stack is cut into
groups of M blocks, and each group is followed by P M / N copies of its last block. *Prefix*: P copies of the
first block go before the stack. *Suffix*: P copies of the last block go after it.

    N = 4, M = 2, P = 2:    0 1 | 2 3    ->    0 1 1' | 2 3 3'      insert
                                         ->    0' 0' 0 1 2 3        prefix
                                         ->    0 1 2 3 3' 3'        suffix

A copy keeps the weights of a trained block, but it must not act yet: x + gate * branch(x) is x if one factor
is zero. The paper does not say which. Here it is the gate rows of the adaLN map (`zero="gate"`), as in
adaLN-zero, or the output projections (`"proj"`), weights **and biases**. Zero one factor, not both: a zero
gate of a nonzero branch gets a gradient in the first step, and the rest of the copy in the second. If both
are zero (`"both"`), neither ever gets a gradient. `"none"` is plain stacking: it keeps the weights but not
the function.

**Width.** Each channel x becomes n equal channels. Then a linear map W has to become

    rows  W -> [W; W]          so that its outputs are duplicates again
    cols  W -> [W  W] / n      so that the sum over equal inputs stays the same

(HyperCloning, arXiv 2409.12903). The other layers are symmetric under duplication: norms without parameters,
GELU, and attention, which has n times as many heads of the same size. Equal halves get equal gradients. They
would stay equal, and the model would be wide in name only. `noise` breaks the symmetry and cancels in the
sum: [W/n + E, W/n - E] (for n > 2: n matrices that add up to zero).

**The optimizer state** grows too (`grow_state`). A parameter that the base had keeps its AdamW moments and
its step count, but for the patch maps after `--patch`. A new parameter has no moments and begins at step 0.
If its moments were zero and its step count old, Adam would not correct their bias towards zero. The first
update would then be (1 - beta1) / sqrt(1 - beta2) times the right length: 3.2 with beta2 = 0.999, 0.45 with
the 0.95 of train.py. In width, n duplicates of an output share its gradient. So exp_avg is divided by n and
exp_avg_sq by n^2 wherever rows are duplicated, which is everywhere but in the last map. This ignores the
noise. The EMA is grown by the operator itself, with the same random numbers.

Left out: zero-padded width (inexact through LayerNorm), learned maps (LiGO), larger heads (inexact through
rotary positions and qk-norm), growth by fractions.
"""

import argparse
import inspect
import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dit import DiT
from machine import run_command
from proof import report
from run import Checkpoint, history_tree, load_checkpoint, save_checkpoint
from stacking import WHERE, stacking_plan

# --------------------------------------------------------------------------------------------------------
# Operators

ZEROS = ("gate", "proj", "both", "none")  # which factor of a copied block is zero
PATCH_MAPS = ("patch_embed.weight", "final.weight", "final.bias")  # know how many pixels a patch has


def grow_depth(model: DiT, add: int, group: int | None = None, where="insert", zero="gate") -> DiT:
    """`add` more blocks, placed by `stacking_plan` and zero-initialized by `zero`: "gate", "proj", "both" or
    "none" (ModelGrow, figure 3). Computes the same bits, except with "none"."""
    if zero not in ZEROS:
        raise ValueError(f"cannot zero {zero!r}; there are {', '.join(ZEROS)}")
    plan = stacking_plan(model.config.depth, add, group, where)
    weights = model.state_dict()
    for j, (i, _) in enumerate(plan):
        for name, weight in model.blocks[i].state_dict().items():
            weights[f"blocks.{j}.{name}"] = weight
    grown = build_grown(model, weights, depth=len(plan))
    for block, (_, is_copy) in zip(grown.blocks, plan, strict=True):
        if is_copy:
            zero_new_block(block, zero)
    return grown


def grow_width(model: DiT, factor: int = 2, noise: float = 1.0) -> DiT:
    """`factor` times as many channels and heads, by duplication. `noise`, relative to each weight matrix,
    makes the duplicates differ: with 0 they stay equal, 0.1 is too little, above 2 the sum is inexact."""
    return grow_by_duplication(model, factor, noise, ("width", "heads"))


def grow_mlp(model: DiT, factor: int = 2, noise: float = 1.0) -> DiT:
    """`factor` times as many hidden neurons in every MLP, by duplication; `noise` as in `grow_width`."""
    return grow_by_duplication(model, factor, noise, ("mlp_ratio",))


def grow_llm(model: DiT, llm_dim: int, seed: int = 0) -> DiT:
    """A second cross-attention in every block, to `llm_dim` channels of an LLM: a copy of the cross-attention
    to the text right before it, with a zero gate (ModelGrow, figure 2). `seed` is for the embedding of the
    LLM's features, which is random; align.py replaces it by a better one."""
    if model.config.llm_dim:
        raise ValueError(f"this model has an LLM branch already, for {model.config.llm_dim} channels")
    if llm_dim < 1:
        raise ValueError(f"llm_dim is {llm_dim}; it must be at least 1")
    weights = model.state_dict()
    for name, weight in model.state_dict().items():
        if ".cross." in name:
            weights[name.replace(".cross.", ".cross_llm.")] = weight
        elif ".adaln." in name:  # (shift, scale, gate) of attn, cross and mlp
            shift, scale, gate = weight.chunk(9)[3:6]
            modulation = torch.cat([shift, scale, torch.zeros_like(gate)])
            weights[name.replace(".adaln.", ".adaln_llm.")] = modulation
    return build_grown(model, weights, seed=seed, llm_dim=llm_dim)


def grow_resolution(model: DiT, frames: int | None = None, size: int | None = None) -> DiT:
    """A model for clips of `frames` frames and `size` x `size` pixels. No parameter changes, and no output on
    clips of the old shape. On larger clips every map of a single token (embedding, cross-attention, MLP)
    gives the same at the same position. Self-attention sees more tokens and has to learn."""
    c = model.config
    frames = c.frames if frames is None else frames
    size = c.size if size is None else size
    if (frames, size) == (c.frames, c.size):
        raise ValueError(f"the model is for clips of {frames} frames of {size} pixels already")
    return build_grown(model, model.state_dict(), frames=frames, size=size)


def grow_patch(model: DiT, factor: int = 2) -> DiT:
    """`factor` times as many pixels along each side of a clip and of its patches, so the number of tokens
    stays. The grown model computes what the base makes of the reduced clip (means of factor x factor pixels),
    enlarged (each pixel repeated), up to rounding. Finer detail has to be learned. The maps are those of
    FlexiViT (arXiv 2212.08013, section 3.4) for nearest neighbours."""
    check_factor(factor)
    config = model.config
    weights = model.state_dict()
    columns = weights["patch_embed.weight"].T
    weights["patch_embed.weight"] = enlarge_patch(columns, config, factor).T / factor**2  # a mean of pixels
    for name in ("final.weight", "final.bias"):
        weights[name] = enlarge_patch(weights[name], config, factor)
    size, patch_size = factor * config.size, factor * config.patch_size
    return build_grown(model, weights, size=size, patch_size=patch_size)


def add_lora(model: DiT, rank: int) -> DiT:
    """Adapters of `rank` beside every linear map of attention and MLP (LoRA, arXiv 2106.09685). All other
    parameters are frozen."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    grown = build_grown(model, model.state_dict(), lora_rank=rank)
    for name, parameter in grown.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return grown


@torch.no_grad()
def merge_lora(model: DiT) -> DiT:
    """The model without adapters: W + B A takes the place of W."""
    if not model.config.lora_rank:
        raise ValueError("this model has no LoRA adapters to merge")
    old = model.state_dict()
    weights = {name: weight for name, weight in old.items() if "lora_" not in name}
    for name in old:
        if name.endswith("lora_a"):
            layer = name.removesuffix("lora_a")
            product = old[layer + "lora_b"] @ old[layer + "lora_a"]
            weights[layer + "weight"] = old[layer + "weight"] + product
    return build_grown(model, weights, lora_rank=0)


OPERATORS = {"depth": grow_depth, "width": grow_width, "mlp": grow_mlp, "llm": grow_llm}
OPERATORS |= {"resolution": grow_resolution, "patch": grow_patch, "lora": add_lora, "merge": merge_lora}
EXACT = ("depth", "llm", "resolution", "lora")  # operators that keep every bit, unless zero is "none"


@torch.no_grad()
def build_grown(base: DiT, weights: dict[str, torch.Tensor], seed=0, **changes) -> DiT:
    """The config of `base` after `changes`, with `weights`; all other parameters are drawn from `seed`."""
    config = replace(base.config, **changes)
    if base.config.lora_rank and config.lora_rank and not changes.keys() <= {"frames", "size"}:
        raise ValueError(
            "this model has LoRA adapters: merge them first, python grow.py RUN --merge --out OTHER"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        grown = DiT(config)
    grown.to(next(base.parameters()))  # device and type
    grown.load_state_dict({**grown.state_dict(), **weights})
    return grown.train(base.training)


@torch.no_grad()
def zero_new_block(block, zero):
    """Zero one factor of each branch of a block: "gate" or "proj"; or "both", or "none"."""
    for name, parameter in block.named_parameters():
        if zero in ("gate", "both") and "adaln" in name:
            rows = parameter.unflatten(0, (-1, 3, block.adaln.in_features))  # (branches, shift scale gate, D)
            rows[:, 2] = 0
        if zero in ("proj", "both") and (".proj." in name or ".down." in name):
            parameter.zero_()


def check_factor(factor):
    """Raise ValueError unless `factor` is a whole number of at least 2."""
    if type(factor) is not int or factor < 2:
        raise ValueError(f"factor is {factor!r}; it must be a whole number of at least 2")


def enlarge_patch(weight, config, factor):
    """Repeat the rows of a map for each pixel of an enlarged patch: (patch_dim, ...) -> (factor^2 patch_dim,
    ...)."""
    pixels = weight.unflatten(0, (3, config.patch_time, config.patch_size, config.patch_size))
    return pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3).flatten(0, 3)


def repeat_channels(old, shape, run):
    """Repeat each run of `run` entries along the axes in which `shape` is larger than that of `old`."""
    for axis, size in enumerate(shape):
        times = size // old.shape[axis]
        if times > 1:
            runs = old.unflatten(axis, (-1, run))
            old = torch.stack([runs] * times, axis + 1).flatten(axis, axis + 2)
    return old


def grow_by_duplication(model, factor, noise, fields) -> DiT:
    """`factor` times the `fields` of the config. Every axis that becomes larger holds runs of D channels, and
    each run is repeated."""
    check_factor(factor)
    if not 0 <= noise < math.inf:
        raise ValueError(f"noise is {noise}; it must be a number from 0 on")
    D = model.config.width
    sizes = {field: factor * getattr(model.config, field) for field in fields}
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in DiT(replace(model.config, **sizes)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, old in model.state_dict().items():
        new = repeat_channels(old, shapes[name], D)
        if old.ndim == 2 and new.shape[1] > old.shape[1]:
            e = torch.randn(new.shape, generator=generator).to(old)
            e = e.unflatten(1, (-1, factor, D))  # (rows, runs, duplicates, D)
            e -= e.mean(2, keepdim=True)  # over the duplicates of an input the noise adds up to zero
            rms = old.square().mean().sqrt()
            new = (new + noise * rms * e.flatten(1)) / factor
        weights[name] = new
    return build_grown(model, weights, **sizes)


# --------------------------------------------------------------------------------------------------------
# Growth of a whole training state


def source_names(base: DiT, grown: DiT, plan=None) -> dict[str, str]:
    """-> {name of a parameter in `grown`: its name in `base`}, without new parameters, copies of blocks, and
    maps of patches that became larger. Names stay the same, except that depth growth moves blocks by its
    `stacking_plan`."""
    old = dict(base.named_parameters())
    if base.config.patch_size != grown.config.patch_size:
        for name in PATCH_MAPS:
            del old[name]
    sources = {}
    for name, _ in grown.named_parameters():
        source, is_copy = name, False
        if plan and name.startswith("blocks."):
            _, number, rest = name.split(".", 2)
            block, is_copy = plan[int(number)]
            source = f"blocks.{block}.{rest}"
        if source in old and not is_copy:
            sources[name] = source
    return sources


def grow_optimizer_state(state: dict, base: DiT, grown: DiT, sources: dict[str, str]) -> dict:
    """AdamW's state of `base`, {parameter: {step, exp_avg, exp_avg_sq}} -> that of `grown`."""
    grown_state = {}
    for name, source in sources.items():
        if source not in state:  # frozen, or never trained
            continue
        old, shape = state[source], grown.get_parameter(name).shape
        mean = repeat_channels(old["exp_avg"], shape, base.config.width)
        square = repeat_channels(old["exp_avg_sq"], shape, base.config.width)
        n = shape[0] // old["exp_avg"].shape[0]  # duplicated outputs share a gradient
        grown_state[name] = {"step": old["step"].clone(), "exp_avg": mean / n, "exp_avg_sq": square / n**2}
    return grown_state


@torch.no_grad()
def grow_state(checkpoint: Checkpoint, operator: str, **options) -> Checkpoint:
    """Grow weights, EMA and optimizer state by one map, and add the growth to the history in the metadata.
    `operator` is a name in OPERATORS; `options` are those of its function. metadata["new"] names the
    parameters made by all growths since the last training; if they made none, those from before. Raises
    ValueError for an unknown operator, and for adapters on new parameters, which would be frozen while they
    are still zero."""
    if operator not in OPERATORS:
        raise ValueError(f"no growth is called {operator!r}; there are {', '.join(OPERATORS)}")
    metadata = {"history": [], "new": [], **checkpoint.metadata}
    history = metadata["history"]
    untrained = [*itertools.takewhile(lambda event: "grow" in event, reversed(history))]  # growths at the end
    zeroed = {event["grow"] for event in untrained if event.get("zero") != "none"} & {"depth", "llm"}
    if any(event["grow"] == "swap" for event in untrained):  # align.py has opened these gates
        zeroed.discard("llm")
    if operator == "lora" and zeroed:
        raise ValueError("adapters would freeze new parameters that are still zero: train them first")

    bound = inspect.signature(OPERATORS[operator]).bind_partial(**options)
    bound.apply_defaults()  # the history names every option
    options = bound.arguments
    base = checkpoint.model
    model = OPERATORS[operator](base, **options)
    ema = OPERATORS[operator](checkpoint.ema, **options)
    plan = None
    if operator == "depth":
        plan = stacking_plan(base.config.depth, options["add"], options["group"], options["where"])
    sources = source_names(base, model, plan)
    optimizer_state = grow_optimizer_state(checkpoint.optimizer_state, base, model, sources)

    before, after = asdict(base.config), asdict(model.config)
    changed = {field: [before[field], after[field]] for field in before if before[field] != after[field]}
    metadata["history"] = [*history, {"grow": operator, **options, "changed": changed}]
    new = [name for name, _ in model.named_parameters() if name not in sources]
    if untrained or not new:  # parameters of an earlier growth still count as new
        earlier = set(metadata["new"])
        new += [name for name, source in sources.items() if source in earlier]
    metadata["new"] = new
    return Checkpoint(model, ema, optimizer_state, metadata, checkpoint.trainer_state)


# --------------------------------------------------------------------------------------------------------
# The command, with its proof


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line. Raises ValueError for options of a growth that is not asked for."""
    about = "Grow a checkpoint, in the order of the options below, and compare both outputs. Without a"
    about += " growth, print its history. The branch for an LLM comes from train.py --grow llm."
    about += " For a folder of diffusers, `python grow.py FOLDER --help` shows the options."
    parser = argparse.ArgumentParser(description=about)
    option = parser.add_argument
    option("checkpoint", help="run or checkpoint, or folder of diffusers")
    option("--merge", action="store_const", const=True, help="add the product of adapters to the weights")
    option("--depth", choices=WHERE, help="more blocks, and where they go")
    option("--add", type=int, help="for --depth: blocks to add [as many as there are]")
    option("--group", type=int, help="for --depth insert: least blocks of a group [as few as possible]")
    option("--zero", choices=ZEROS, help="for --depth: which factor of the copies is zero [gate]")
    option("--patch", type=int, metavar="FACTOR", help="larger patches: FACTOR times the pixels a side")
    option("--frames", type=int, help="frames of a clip")
    option("--size", type=int, help="height and width of a clip in pixels")
    option("--width", type=int, metavar="FACTOR", help="times as many channels and heads")
    option("--mlp", type=int, metavar="FACTOR", help="times as many hidden neurons in every MLP")
    option("--noise", type=float, help="for --width and --mlp: makes duplicates differ [1]")
    option("--lora", type=int, metavar="RANK", help="adapters beside frozen weights")
    option("--out", help="run directory for the grown checkpoint; without it nothing is written")
    args = parser.parse_args(argv)
    for name in ("add", "group", "zero"):
        if getattr(args, name) is not None and args.depth is None:
            raise ValueError(f"--{name} is for --depth, which is not given")
    if args.noise is not None and args.width is None and args.mlp is None:
        raise ValueError("--noise is for --width and --mlp, which are not given")
    return args


def requested_growths(args: argparse.Namespace, depth: int) -> list[tuple[str, dict]]:
    """-> (operator, options of its function), in order. `depth` is that of the base."""
    add = depth if args.add is None else args.add
    zero = args.zero or "gate"
    noise = 1.0 if args.noise is None else args.noise
    resolution = args.size if args.frames is None else args.frames
    possible = [
        ("merge", args.merge, {}),
        ("depth", args.depth, {"add": add, "group": args.group, "where": args.depth, "zero": zero}),
        ("patch", args.patch, {"factor": args.patch}),
        ("resolution", resolution, {"frames": args.frames, "size": args.size}),
        ("width", args.width, {"factor": args.width, "noise": noise}),
        ("mlp", args.mlp, {"factor": args.mlp, "noise": noise}),
        ("lora", args.lora, {"rank": args.lora}),
    ]
    return [(operator, options) for operator, given, options in possible if given is not None]


def main(argv=None):
    """Grow a checkpoint and prove that nothing changed: `python grow.py runs/base --depth insert`."""
    from command_diffusers import grow_folder  # only needed for diffusers folders

    if grow_folder(argv):
        return
    args = parse_arguments(argv)
    if args.out and Path(args.out).exists():
        raise ValueError(f"{args.out} is there already: name another directory with --out")
    base = grown = load_checkpoint(args.checkpoint)
    growths = requested_growths(args, base.ema.config.depth)
    if args.out and not growths:
        raise ValueError("--out is for a grown checkpoint: ask for a growth, such as --depth insert")
    exact = True
    for operator, options in growths:
        grown = grow_state(grown, operator, **options)
        exact = exact and operator in EXACT and options.get("zero") != "none"
    lines = report(base.ema, grown.ema, grown.metadata["new"], exact) if growths else []
    if args.out:
        save_checkpoint(Path(args.out) / "checkpoint", grown)  # before a line that may fail to print
        lines.append(f"written to {args.out}")
    print("\n".join([*lines, history_tree(grown.metadata["history"])]))


if __name__ == "__main__":
    run_command(main, memory_hint="take a smaller growth")
