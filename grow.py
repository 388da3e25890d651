"""Growth: a larger model that computes the same function.

ModelGrow (arXiv 2412.18966) continues the training of a video model after making it larger. At the moment of
growth nothing may be lost, so the grown network has to be the same function as the base; the new parameters
then learn what the old ones had no room for. Each operator below takes a model and returns a new one:

    grow_depth    more blocks: copies, silent at first                            the same bits
    grow_width    more channels and heads: duplicates that share the work         the same up to rounding
    grow_mlp      more hidden neurons: duplicates that share the work             the same up to rounding
    grow_llm      a second cross-attention in each block, silent at first         the same bits
    grow_clip     more frames and pixels: nothing, since positions are formulas   the same bits on old sizes
    add_lora      low-rank adapters beside frozen weights, silent at first        the same bits
    merge_lora    and their product added to the weights                          the same up to rounding

**Depth** (figure 3). Of N blocks some are copied, P copies in all. *Insert*: the stack is cut into groups of
M blocks, and each group is followed by P M / N copies of its last block. *Prefix*: P copies of the first
block go before the stack. *Suffix*: P copies of the last one go behind it.

    N = 4, M = 2, P = 2:    0 1 | 2 3    ->    0 1 1' | 2 3 3'      insert
                                         ->    0' 0' 0 1 2 3        prefix
                                         ->    0 1 2 3 3' 3'        suffix

A copy starts with useful weights, but it must not act: x + gate * branch(x) is x if one factor is zero. The
paper does not say which. Here it is the rows of the adaLN map that make gates (`zero="gate"`), as adaLN-zero
starts a model from scratch, or the output projections (`"proj"`), weights **and biases**. One factor, not
both: a zero gate on a live branch gets a gradient at once, and the rest of the copy follows one step later.
With both zero (`"both"`) each waits for the other for ever. `"none"` is plain stacking, which keeps the
weights but not the function.

**Width.** Each channel x becomes n equal ones. Then a linear map W has to become

    rows  W -> [W; W]          so that its outputs are duplicates again
    cols  W -> [W  W] / n      so that the sum over equal inputs is what it was

(HyperCloning, arXiv 2409.12903). Everything else here is symmetric under this: norms without parameters,
GELU, and attention, since there are n times the heads and each keeps its size. Equal halves get equal
gradients, so they would stay equal for ever and the model would be wide in name only. `noise` breaks the
symmetry and cancels in the sum: [W/n + E, W/n - E] (for n > 2, n matrices that add up to zero).

**The optimiser** comes along by the same map (`grow_state`). What is copied keeps its AdamW moments and its
step count; what is new has none and begins at step 0. (Zero moments with the old step would be a trap: Adam
treats the second moment as converged, and the first update is (1 - beta1) / sqrt(1 - beta2) of what it should
be, 3.2 times too long with beta2 = 0.999 and less than half with the 0.95 of train.py.) In width, n
duplicates of an output share the gradient that it had, so exp_avg is divided by n and exp_avg_sq by n^2
wherever rows are duplicated, which is everywhere but in the last map; this leaves the noise out of account.
The EMA is grown by the operator itself, with the same random numbers.

Left out: zero-padded width (inexact through LayerNorm), learned maps (LiGO), larger heads (inexact through
rotary positions and qk-norm), growth by fractions.
"""

import argparse
import copy
import inspect
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from checkpoint import Checkpoint, load_checkpoint, save_checkpoint, tree
from dit import PRESETS, DiT

# --------------------------------------------------------------------------------------------------------
# Operators

ZEROS = ("gate", "proj", "both", "none")  # what silences a copied block


def stack(depth, add, group=None, where="insert") -> list[tuple[int, bool]]:
    """The grown stack of figure 3 as (block of the base, is it a new copy?), in order. `depth` N, `add` P,
    `group` M. There are N // M groups; a rest of blocks goes to the first ones, one each. Without M there are
    as many groups as blocks or copies, whichever are fewer, and a rest of copies goes to the first ones:
    LLaMA-Pro's rule (arXiv 2401.02415) where P divides N. Raises ValueError where groups of M cannot share P
    copies evenly."""
    if where not in ("insert", "prefix", "suffix"):
        raise ValueError(f"no stacking is called {where!r}; there are insert, prefix and suffix")
    if add < 1:
        raise ValueError(f"cannot add {add} blocks; it must be at least 1")
    if group is not None and where != "insert":
        raise ValueError(f"{where} stacking has no groups; group is for insert")
    old = [(i, False) for i in range(depth)]
    if where == "prefix":
        return [(0, True)] * add + old
    if where == "suffix":
        return old + [(depth - 1, True)] * add
    if group is not None and not 1 <= group <= depth:
        raise ValueError(f"cannot cut {depth} blocks into groups of {group}")
    groups = depth // group if group else min(add, depth)
    if group and add % groups:
        raise ValueError(f"{groups} groups of blocks cannot share {add} copies evenly: add a multiple")
    plan, start = [], 0
    for i in range(groups):
        end = start + depth // groups + (i < depth % groups)
        plan += old[start:end] + [(end - 1, True)] * (add // groups + (i < add % groups))
        start = end
    return plan


def grow_depth(model: DiT, add: int, group: int | None = None, where="insert", zero="gate") -> DiT:
    """`add` more blocks, placed as `stack` says and silenced by `zero`: "gate", "proj", "both" or "none"
    (ModelGrow, figure 3). The same function, bit for bit, but for "none"."""
    if zero not in ZEROS:
        raise ValueError(f"cannot zero {zero!r}; there are {', '.join(ZEROS)}")
    plan, old = stack(model.config.depth, add, group, where), model.state_dict()
    kept = {name: name for name in old if not name.startswith("blocks.")}
    origin = dict(kept)
    for j, (i, new) in enumerate(plan):
        names = {f"blocks.{j}.{name}": f"blocks.{i}.{name}" for name in model.blocks[i].state_dict()}
        origin |= names
        kept |= {} if new else names
    weights = {name: old[source] for name, source in origin.items()}
    grown = _assemble(model, weights, kept, depth=len(plan))
    for block, (_, new) in zip(grown.blocks, plan, strict=True):
        if new:
            _silence(block, zero)
    return grown


def grow_width(model: DiT, factor: int = 2, noise: float = 1.0) -> DiT:
    """`factor` times the channels and heads, by duplication. `noise`, relative to each weight matrix, tells
    the duplicates apart: with 0 they stay equal for ever, with 0.1 too equal, with more than 2 the sum is
    inexact."""
    return _duplicate(model, factor, noise, ("width", "heads"))


def grow_mlp(model: DiT, factor: int = 2, noise: float = 1.0) -> DiT:
    """`factor` times the hidden neurons of each block's MLP, by duplication; `noise` as in `grow_width`."""
    return _duplicate(model, factor, noise, ("mlp_ratio",))


def grow_llm(model: DiT, llm_dim: int, refiner: int = 0, seed: int = 0) -> DiT:
    """In each block a cross-attention to `llm_dim` channels of an LLM, a copy of the one to the text right
    before it, with a zero gate; in front, `refiner` new blocks. `seed` is that of what is new. How the new
    branch gets to understand an LLM is told in align.py."""
    if model.config.llm_dim:
        raise ValueError(f"this model has an LLM branch already, for {model.config.llm_dim} channels")
    if llm_dim < 1:
        raise ValueError(f"llm_dim is {llm_dim}; it must be at least 1")
    old = model.state_dict()
    weights = dict(old)
    for name, weight in old.items():
        if ".cross." in name:
            weights[name.replace(".cross.", ".cross_llm.")] = weight
        elif ".adaln." in name:  # that of the cross-attention to the text is the second of three
            shift, scale, gate = weight.chunk(9)[3:6]
            weights[name.replace(".adaln.", ".adaln_llm.")] = torch.cat(
                [shift, scale, torch.zeros_like(gate)]
            )
    return _assemble(model, weights, seed=seed, llm_dim=llm_dim, llm_refiner=refiner)


def grow_clip(model: DiT, frames: int | None = None, size: int | None = None) -> DiT:
    """Clips of `frames` frames and `size` x `size` pixels from now on. No parameter changes, and neither
    does any output on clips of the old shape. On larger clips each map of a single token (embedding,
    cross-attention, MLP) gives what it gave at the same place; self-attention has more tokens to look at,
    and has to learn."""
    c = model.config
    frames, size = c.frames if frames is None else frames, c.size if size is None else size
    if (frames, size) == (c.frames, c.size):
        raise ValueError(f"the model is for clips of {frames} frames of {size} pixels already")
    return _assemble(model, model.state_dict(), frames=frames, size=size)


def add_lora(model: DiT, rank: int) -> DiT:
    """Adapters of `rank` beside each linear map of attention and MLP (LoRA, arXiv 2106.09685). They alone
    can be trained: everything else is frozen."""
    if rank < 1:
        raise ValueError(f"rank is {rank}; it must be at least 1")
    grown = _assemble(model, model.state_dict(), lora_rank=rank)
    for name in grown.kept:
        grown.get_parameter(name).requires_grad_(False)
    return grown


@torch.no_grad()
def merge_lora(model: DiT) -> DiT:
    """The model without its adapters, W + B A in the place of W."""
    if not model.config.lora_rank:
        raise ValueError("this model has no LoRA adapters to merge")
    old = model.state_dict()
    weights = {name: weight for name, weight in old.items() if "lora_" not in name}
    for name in [n for n in old if n.endswith("lora_a")]:
        layer = name.removesuffix("lora_a")
        weights[layer + "weight"] = old[layer + "weight"] + old[layer + "lora_b"] @ old[name]
    return _assemble(model, weights, lora_rank=0)


OPERATORS = {"depth": grow_depth, "width": grow_width, "mlp": grow_mlp, "llm": grow_llm, "clip": grow_clip}
OPERATORS |= {"lora": add_lora, "merge": merge_lora}


@torch.no_grad()
def _assemble(base: DiT, weights: dict, kept: dict[str, str] | None = None, seed=0, **changes) -> DiT:
    """base's config with `changes`, and `weights`; what they do not name is initialised by `seed`. In `kept`
    the model remembers what was there before, and how base calls it: by default as it does."""
    config = replace(base.config, **changes)
    if base.config.lora_rank and config.lora_rank and not changes.keys() <= {"frames", "size"}:
        raise ValueError("this model has LoRA adapters: merge them before it grows")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown = DiT(config)
    grown.to(next(base.parameters())).load_state_dict({**grown.state_dict(), **weights})
    old = base.state_dict()
    grown.kept = kept or {name: name for name in grown.state_dict() if name in old}
    return grown.train(base.training)


@torch.no_grad()
def _silence(block, zero):
    """Zero one factor of each branch of a block, "gate" or "proj"; or "both", or "none"."""
    for name, parameter in block.named_parameters():
        if zero in ("gate", "both") and "adaln" in name:  # rows of (shift, scale, gate) for each branch
            parameter.unflatten(0, (-1, 3, block.adaln.in_features))[:, 2] = 0
        if zero in ("proj", "both") and (".proj." in name or ".down." in name):
            parameter.zero_()


def _repeat(old, shape, run):
    """Repeat each run of `run` entries along the axes in which `shape` is larger than that of `old`."""
    for axis, size in enumerate(shape):
        times = size // old.shape[axis]
        if times > 1:
            runs = old.unflatten(axis, (-1, run))
            old = torch.stack([runs] * times, axis + 1).flatten(axis, axis + 2)
    return old


def _duplicate(model, factor, noise, fields) -> DiT:
    """Width by duplication: `factor` times the `fields` of the config. Every axis that becomes larger
    holds runs of D channels, and each run is repeated."""
    if type(factor) is not int or factor < 2:
        raise ValueError(f"factor is {factor!r}; it must be a whole number of at least 2")
    sizes, D = {field: factor * getattr(model.config, field) for field in fields}, model.config.width
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in DiT(replace(model.config, **sizes)).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, old in model.state_dict().items():
        new = _repeat(old, shapes[name], D)
        if old.ndim == 2 and new.shape[1] > old.shape[1]:
            e = torch.randn(new.shape, generator=generator).to(old).unflatten(1, (-1, factor, D))
            e -= e.mean(2, keepdim=True)  # over the duplicates of an input the noise adds up to zero
            new = (new + noise * old.square().mean().sqrt() * e.flatten(1)) / factor
        weights[name] = new
    return _assemble(model, weights, **sizes)


# --------------------------------------------------------------------------------------------------------
# Growth of a whole training run


@torch.no_grad()
def grow_state(checkpoint: Checkpoint, operator: str, **options) -> Checkpoint:
    """Grow weights, EMA and AdamW moments by one map, and write the growth into the header's history.

    operator: a name in OPERATORS; options: those of that function. header["new"] names the parameters made by
    the last growth, and others since the last training. Raises ValueError for an unknown operator, and for
    adapters on what has just grown: they would freeze it while it is silent."""
    if operator not in OPERATORS:
        raise ValueError(f"no growth is called {operator!r}; there are {', '.join(OPERATORS)}")
    header = {"history": [], "new": [], **checkpoint.header}
    growing = header["history"] and "grow" in header["history"][-1]
    if operator == "lora" and growing and header["new"]:
        raise ValueError("adapters would freeze what has just grown, and is silent still: train it first")
    grow = OPERATORS[operator]
    bound = inspect.signature(grow).bind_partial(**options)
    bound.apply_defaults()  # the history tells them all
    model, ema = (grow(m, **bound.arguments) for m in (checkpoint.model, checkpoint.ema))
    moments, run = {}, checkpoint.model.config.width
    for name, parameter in model.named_parameters():
        if (old := checkpoint.moments.get(model.kept.get(name))) is None:
            continue
        share = parameter.shape[0] // old["exp_avg"].shape[0]  # duplicated outputs share a gradient
        moments[name] = {
            "step": old["step"].clone(),
            "exp_avg": _repeat(old["exp_avg"], parameter.shape, run) / share,
            "exp_avg_sq": _repeat(old["exp_avg_sq"], parameter.shape, run) / share**2,
        }
    before, after = asdict(checkpoint.model.config), asdict(model.config)
    changed = {key: [before[key], after[key]] for key in before if before[key] != after[key]}
    header["history"] = [*header["history"], {"grow": operator, **bound.arguments, "changed": changed}]
    made = [name for name in model.state_dict() if name not in model.kept]
    recent = header["new"] if growing or not made else []
    header["new"] = made + [new for new, old in model.kept.items() if old in recent]
    return Checkpoint(model, ema, moments, header, checkpoint.state)


# --------------------------------------------------------------------------------------------------------
# Proof, and the command line


@torch.no_grad()
def difference(a: DiT, b: DiT, batch: int = 2, length: int = 7) -> float:
    """The largest |a - b| over all outputs on random inputs of a's shape, in the precision of the models."""
    c, like = a.config, next(a.parameters())
    generator = torch.Generator().manual_seed(0)
    x, text, llm = (
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64).to(like)
        for shape in ((3, c.frames, c.size, c.size), (length, c.text_dim), (length, max(1, b.config.llm_dim)))
    )
    t = torch.rand(batch, generator=generator).to(like)
    mask = (torch.arange(length) < torch.arange(length, length - batch, -1)[:, None]).to(like.device)
    one, two = (m(x, t, text, mask, *((llm, mask) if m.config.llm_dim else ())) for m in (a, b))
    return (one - two).abs().max().item()


def summary(names, every) -> str:
    """Names of parameters, all of those that begin alike as one: "blocks.1" for the sixteen of that block."""
    short = {}
    for name in names:
        parts = name.split(".")
        starts = (".".join(parts[:i]) + "." for i in range(1, len(parts) + 1))
        short[next(s for s in starts if all(n in names for n in every if f"{n}.".startswith(s)))[:-1]] = None
    return ", ".join(short) or "none"


def compare(name: str, base: DiT, steps: list[tuple[str, dict]]) -> list[str]:
    """What the growths `steps` do to `base`, as cells of a table: size; parameters, and which are new, kept
    or frozen, in millions; GFLOPs per clip, forward, with 16 tokens of text and 64 of an LLM; and max
    |difference| on random inputs, growth itself done in float64 and in float32."""
    errors = []
    for dtype in (torch.float64, torch.float32):
        start = copy.deepcopy(base).to(dtype)
        state = Checkpoint(start, start, {}, {"new": []}, {})
        for operator, options in steps:
            state = grow_state(state, operator, **options)
        errors.append(difference(start, state.model))
    config, parameters = state.model.config, dict(state.model.named_parameters())
    new, frozen = state.header["new"], [n for n, p in parameters.items() if not p.requires_grad]
    kinds = parameters, new, parameters.keys() - set(new), frozen
    counts = [f"{sum(parameters[name].numel() for name in kind) / 1e6:.2f}" for kind in kinds]
    counts += [f"{config.flops(16, 64) / 1e9:.2f}", *(f"{e:.1e}" if e else "0" for e in errors)]
    return [name, f"{config.depth} x {config.width}", *counts]


def markdown(rows: list[list[str]]) -> str:
    """Cells from `compare` -> a table in Markdown, aligned."""
    titles = "growth|blocks x width|parameters|new|kept|frozen|GFLOPs|difference, fp64|fp32"
    rows = [titles.split("|"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * w for w in widths])
    cells = ([cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def randomise(model: DiT, seed=0) -> DiT:
    """Leave no weight at zero, so that every branch speaks: a test of equality that could fail."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 0.3 if parameter.ndim == 1 else parameter.shape[1] ** -0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
    return model


def table() -> str:
    """Every operator on a random `tiny` model."""
    base = randomise(DiT(PRESETS["tiny"]))
    adapted = randomise(add_lora(base, 8))
    cases = [("base", base, [])]
    for where, zero in [("insert", zero) for zero in ZEROS] + [("prefix", "gate"), ("suffix", "gate")]:
        step = ("depth", {"add": 4, "where": where, "zero": zero})
        cases.append((f"depth, {where}, zero {zero}", base, [step]))
    cases += [
        ("width x 2", base, [("width", {})]),
        ("MLP x 2", base, [("mlp", {})]),
        ("depth, width, depth", base, [("depth", {"add": 2}), ("width", {}), ("depth", {"add": 6})]),
        ("LLM of 576 channels", base, [("llm", {"llm_dim": 576})]),
        ("16 frames, 64 pixels", base, [("clip", {"frames": 16, "size": 64})]),
        ("LoRA of rank 8", base, [("lora", {"rank": 8})]),
        ("LoRA of rank 8, merged", adapted, [("merge", {})]),
    ]
    return markdown([compare(*case) for case in cases])


def main(argv=None):
    """Grow a checkpoint and prove that nothing changed: `python grow.py runs/base --depth insert`."""
    parser = argparse.ArgumentParser(
        description="Grow a checkpoint, optimiser state included, and prove that it computes the same. "
        "Growths are done in the order of this list; without any, print how the checkpoint came about."
    )
    add = parser.add_argument
    add("checkpoint", nargs="?", help="run or checkpoint to grow")
    add("--merge", action="store_true", help="add the product of LoRA adapters to the weights")
    add("--depth", choices=("insert", "prefix", "suffix"), help="more blocks, and where they go")
    add("--add", type=int, help="for --depth: blocks to add [as many as there are, which doubles the depth]")
    add("--group", type=int, help="for --depth insert: blocks per group [as few as the copies allow]")
    add("--zero", choices=ZEROS, help="for --depth: what is zeroed in the copies [gate]")
    add("--frames", type=int, help="frames of a clip from now on")
    add("--size", type=int, help="pixels per side of a clip from now on")
    add("--width", type=int, metavar="FACTOR", help="times as many channels and heads")
    add("--mlp", type=int, metavar="FACTOR", help="times as many hidden neurons in each MLP")
    add("--noise", type=float, help="for --width and --mlp: what tells duplicates apart [1]")
    add("--llm", type=int, metavar="DIM", help="cross-attention to DIM channels of an LLM in each block")
    add("--lora", type=int, metavar="RANK", help="adapters beside frozen weights")
    add("--out", help="run directory for the grown checkpoint; without it nothing is written")
    add("--table", action="store_true", help="do every growth to a random model; the table of README")
    args = parser.parse_args(argv)
    if args.table:
        return print(table())
    if not args.checkpoint:
        raise ValueError("name a run or checkpoint to grow, as in `python grow.py runs/base --depth insert`")
    for option, operators in (
        ("add", "depth"),
        ("group", "depth"),
        ("zero", "depth"),
        ("noise", "width mlp"),
    ):
        if getattr(args, option) is not None and all(getattr(args, o) is None for o in operators.split()):
            raise ValueError(f"--{option} is for --{operators.replace(' ', ' and --')}, which is not given")
    if args.out and Path(args.out).exists():
        raise ValueError(f"{args.out} is there already: name another directory with --out")
    checkpoint = load_checkpoint(args.checkpoint)
    base, steps = checkpoint.ema, [("merge", {})] if args.merge else []
    if args.depth:
        add = base.config.depth if args.add is None else args.add
        options = {"group": args.group, "where": args.depth, "zero": args.zero or "gate"}
        steps.append(("depth", {"add": add, **options}))
    if (args.frames, args.size) != (None, None):
        steps.append(("clip", {"frames": args.frames, "size": args.size}))
    options = {"width": "factor", "mlp": "factor", "llm": "llm_dim", "lora": "rank"}
    for operator, option in options.items():
        if (value := getattr(args, operator)) is not None:
            steps.append((operator, {option: value}))
            if option == "factor" and args.noise is not None:
                steps[-1][1]["noise"] = args.noise

    for operator, options in steps:
        checkpoint = grow_state(checkpoint, operator, **options)
    if steps:
        name = " + ".join(operator for operator, _ in steps)
        print(markdown([compare(str(args.checkpoint), base, []), compare(name, base, steps)]))
        every = dict(checkpoint.model.named_parameters())
        frozen = [name for name, parameter in every.items() if not parameter.requires_grad]
        print(f"new: {summary(checkpoint.header['new'], every)}\nfrozen: {summary(frozen, every)}\n")
    print(tree(checkpoint.header["history"]))
    if args.out:
        save_checkpoint(Path(args.out) / "checkpoint", checkpoint)
        print(f"written to {args.out}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
