"""Rectified flow, and the loop that trains it.

**The method.** Draw a straight line between noise and a clip, x_t = t x + (1 - t) noise, with t = 0 noise and
t = 1 the clip (rectified flow, arXiv 2209.03003). Ask the model for the clip x at the end of the line; the
velocity it implies is (x_predicted - x_t) / (1 - t), the true one is x - noise, and the loss is the squared
difference of the two, which is the squared error of the clip over (1 - t)^2 (JiT, arXiv 2511.13720: predict
x, weigh as velocity; 1 - t is not taken below 0.05). Times are logit-normal, sigmoid(N(-0.8, 0.8)): most of
what is hard happens early, in noise. One caption in ten is replaced by the null prompt, which sample.py needs
for guidance. A model that reads with an LLM as well gets others from the LLM alone (`HIDDEN`): what the small
encoder has explained already, nothing would make it look up in the new branch.

**The loop.** AdamW; a learning rate that warms up, stays, and decays to zero at the end (a plateau can be
continued or grown from, a cosine cannot); gradients clipped; an exponential moving average (EMA) of the
weights, which is what is sampled, evaluated and grown; bfloat16 matrix products where the machine is fast at
them.

**Nothing is random but by number.** The batch, the noise, the times and the dropped captions of a step are
functions of (seed, step) alone. There is no generator state to save: a run that was killed and resumed draws
what it would have drawn.

**Going on from a run** (`--from`, and `--grow` first, see grow.py) takes weights, EMA and AdamW moments along
and counts its steps. The learning rate starts where that run left it: one that had decayed warms up again,
one that was stopped on its plateau goes on as if nothing had happened. What is frozen (`--tune new`, the rule
of LLaMA-Pro; `--tune lora`) keeps its EMA weights, as nothing will average it any more. If that run learned
from other clips, the loss on those is watched too: what is forgotten.

**A run** is a directory: checkpoint/ (see checkpoint.py), metrics.jsonl, loss.png, samples/step_N.gif,
args.json.

Differences from big trainers: one process, no configuration files, no logger but a file of JSON lines.
"""

import argparse
import copy
import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoint import Checkpoint, load_checkpoint, load_model, plot_losses, save_checkpoint, tree
from data import PROMPTS, ToyWorld, save_grid
from dit import PRESETS, DiT, count_flops
from grow import ZEROS, grow_state
from sample import autocast, pick_device, pick_precision, solve, to_uint8
from text_encoder import LAYERS, NULL_PROMPT, Prompts, encode

START = time.perf_counter()  # of the process: --minutes means minutes
T_BINS = 8  # slices of the times, equally likely in training, for the validation loss
TUNE = ("all", "new", "lora")
DIVERGED = "lower --lr; the last checkpoint is kept"
DROP = 0.1  # share of captions replaced by the null prompt, for guidance
HIDDEN = 0.35  # share hidden from the small encoder when an LLM reads too; chosen by measurement (README)
LOG_EVERY = 10  # steps per line of metrics.jsonl

# --------------------------------------------------------------------------------------------------------
# The method


def flow_loss(model, x, t, noise, prompt):
    """The velocity loss of each clip. x (B, 3, T, H, W) in [-1, 1]; t (B,) in [0, 1); noise like x; prompt,
    the features (B, L, D) and mask (B, L) of each text encoder -> (B,) float32, each the mean over a clip. A
    model that predicts grey has about the variance of the data over (1 - t)^2."""
    s = t.view(-1, 1, 1, 1, 1)
    predicted = model(s * x + (1 - s) * noise, t, *prompt)
    return ((predicted.float() - x) / (1 - s).clamp_min(0.05)).square().mean((1, 2, 3, 4))


def time_of(normal):
    """Standard normal numbers -> logit-normal times in (0, 1): sigmoid(N(-0.8, 0.8))."""
    return torch.sigmoid(-0.8 + 0.8 * normal)


def random_draws(seed, step, shape, count):
    """All that is random in step `step` of a run: B row numbers below `count`, logit-normal times (B,),
    noise of `shape` (B, 3, T, H, W), and uniform numbers (B,) that decide which captions to drop."""
    generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
    rows = torch.randint(count, shape[:1], generator=generator)
    t = time_of(torch.randn(shape[0], generator=generator))
    noise = torch.randn(shape, generator=generator)
    return rows, t, noise, torch.rand(shape[0], generator=generator)


@torch.no_grad()
def validation_loss(model, world, prompts, precision=None):
    """The loss on every clip of `world` at fixed noise and at times drawn as in training -> (T_BINS,),
    means over equally likely slices of the times: which part of the way from noise to clip is hard.
    `precision` is the autocast type, None for float32."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    losses = []
    for rows in torch.arange(len(world)).split(64):
        x, captions = world.batch(rows)
        t = time_of(
            torch.special.ndtri((rows % T_BINS + torch.rand(len(rows), generator=generator)) / T_BINS)
        )
        noise = torch.randn(x.shape, generator=generator)
        x, t, noise, *prompt = (v.to(device) for v in (x, t, noise, *prompts.batch(captions)))
        with autocast(device, precision):
            losses.append(flow_loss(model, x, t, noise, prompt).cpu())
    losses = torch.cat(losses)
    return torch.stack([losses[b::T_BINS].mean() for b in range(T_BINS)])


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema += (1 - d) (model - ema). d rises to `decay`, so that the first steps are not dominated by the
    start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def learning_rate(peak, step, progress, warmup, decay=0.3, start=0.0):
    """From `start` to the peak over `warmup` steps, a plateau, and a straight line to zero over the last
    `decay` of the run; `progress` is the share of the run that is over, in [0, 1]."""
    rate = start + (peak - start) * min(1.0, (step + 1) / warmup)
    return rate * min(1.0, (1 - progress) / decay) if decay else rate


# --------------------------------------------------------------------------------------------------------
# The loop


def starting_point(args, run) -> Checkpoint | None:
    """What to go on from: the run itself, or another, grown if that is wanted; None for a new model."""
    if args.resume:
        return load_checkpoint(run)
    if not args.base:
        return None
    start = load_checkpoint(args.base)
    if args.text not in (None, start.header["text_encoder"]):
        raise ValueError(f"{args.base} was trained with --text {start.header['text_encoder']}")
    for operator in filter(None, (args.grow or "").split(",")):
        options = {}
        if operator == "depth":
            add = args.add or start.model.config.depth
            options = {"add": add, "where": args.where or "insert", "zero": args.zero or "gate"}
        if operator == "llm":
            dim = encode([], args.llm, args.llm_features).dim
            options = {"llm_dim": dim, "refiner": args.refiner, "seed": args.seed}
            start.header.update(llm=args.llm, llm_features=args.llm_features)
        start = grow_state(start, operator, **options)
    clip = {name: value for name in ("frames", "size") if (value := getattr(args, name)) is not None}
    if any(value != getattr(start.model.config, name) for name, value in clip.items()):
        start = grow_state(start, "clip", **clip)
    if args.tune == "lora" and not start.model.config.lora_rank:
        start = grow_state(start, "lora", rank=args.rank)
    return start


def freeze(model, ema, tune, new):
    """Leave trainable what `tune` says: "all", "lora" (adapters) or "new" (the parameters named in `new`).
    The rest takes its values from the EMA."""
    for (name, parameter), averaged in zip(model.named_parameters(), ema.parameters(), strict=True):
        if not (tune == "all" or (tune == "lora" and "lora_" in name) or (tune == "new" and name in new)):
            parameter.requires_grad_(False).data.copy_(averaged)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--tune {tune} leaves nothing to train: no growth has made such parameters")


def train(args, started=None, read=Prompts):
    """Train as the command line says (see `parse_arguments`) -> the run's directory. The clock of --minutes
    began at `started` (`time.perf_counter`), by default now. `read` is how prompts become features. Raises
    ValueError or OSError, in one line, for whatever the user can mend."""
    started = started or time.perf_counter()
    run = Path(args.out)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    if not args.resume and any((run / name).exists() for name in ("checkpoint", "checkpoint.old")):
        raise ValueError(f"{run} holds a run already: go on with --resume, or name another with --out")
    start = starting_point(args, run)
    config = PRESETS[args.preset] if start is None else start.model.config
    if start is None:  # the size of the text features is not known yet
        sizes = ("frames", "size", "depth")
        config = replace(config, **{name: getattr(args, name) or getattr(config, name) for name in sizes})

    if args.drop_text is None:
        args.drop_text = HIDDEN if config.llm_dim else 0.0
    elif args.drop_text and not config.llm_dim:
        raise ValueError("--drop-text is for a model that reads with an LLM: grow it with --grow llm")

    # Data and the features of all its captions.
    run.mkdir(parents=True, exist_ok=True)
    header = start.header if start else {"text_encoder": args.text or "minilm", "history": [], "flops": 0}
    history = header["history"][:-1] if args.resume else header["history"]
    clip = (config.frames, config.size)
    world = ToyWorld(args.data, args.clips, 0, *clip, args.captions, args.words)
    few = min(args.clips, 256)
    held_out = {"val_loss": ToyWorld(args.data, few, 1, *clip, args.captions, args.words)}
    old = [event for event in history if "train" in event][-1:]
    if old and (old[0]["train"], old[0]["captions"]) != (args.data, args.captions):
        held_out["old_val_loss"] = ToyWorld(old[0]["train"], few, 1, *clip, old[0]["captions"])
    texts = [*world.captions, *(c for w in held_out.values() for c in w.captions), *PROMPTS]
    prompts = read(texts, header, config.llm_dim)
    lengths = [stream.max_length for stream in prompts.streams]

    if start is None:
        torch.manual_seed(args.seed)
        model = DiT(replace(config, text_dim=prompts.streams[0].dim))
        start = Checkpoint(model, copy.deepcopy(model), {}, header, {})
    model, ema, moments, header, state = start
    model, ema = model.to(device).train(), ema.to(device).eval().requires_grad_(False)
    config = model.config
    args.tune = args.tune or ("lora" if config.lora_rank else "all")
    freeze(model, ema, args.tune, header.get("new", ()))
    wider = (config.width / 128) ** 0.5  # the peak is kept from run to run, but falls with this
    peak_at_128 = args.lr * wider if args.lr else state.get("peak_at_128", 3e-3)
    peak = peak_at_128 / wider
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for name, parameter in trained.items():
        if name in moments:
            optimiser.state[parameter] = {kind: tensor.to(device) for kind, tensor in moments[name].items()}
    shape = (args.batch, 3, config.frames, config.size, config.size)
    step_flops = args.batch * count_flops(model, lengths)

    # Where the run stands.
    metrics, records = run / "metrics.jsonl", []
    if args.resume:
        records = [r for r in map(json.loads, metrics.read_text().splitlines()) if r["step"] <= state["step"]]
    else:
        rate = state.get("lr", 0.0)
        state = {"step": 0, "seconds": 0.0, "look_seconds": 0.0, "flops_before": header["flops"]}
        state |= {"lr_before": rate, "lr": rate, "peak_at_128": peak_at_128}
    if args.flops:
        args.steps = round((args.flops - state["flops_before"]) / step_flops)
        if args.steps < 1:
            raise ValueError(
                f"--flops counts those of the base too, {state['flops_before']:.2e}: ask for more"
            )
    (run / "args.json").write_text(json.dumps(vars(args), indent=1))
    steps_before = sum(event.get("steps", 0) for event in history)
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    begun = started - state["seconds"]

    def record(**entry):
        records.append({"step": state["step"], **entry})
        with metrics.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")

    def look():
        """Validate, draw samples, save."""
        begin = time.perf_counter()
        header["flops"] = state["flops_before"] + state["step"] * step_flops
        entry = {"flops": header["flops"]}
        for name, clips in held_out.items():
            by_t = validation_loss(ema, clips, prompts, precision).tolist()
            entry |= {name: sum(by_t) / T_BINS, f"{name}_by_t": by_t}
        if not math.isfinite(entry["val_loss"]):
            raise ValueError(f"the weights are not finite at step {state['step']}: {DIVERGED}")
        record(**entry)
        noise = torch.randn(len(PROMPTS), *shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        prompt, empty = ([v.to(device) for v in prompts.batch(p)] for p in (PROMPTS, [NULL_PROMPT]))
        with autocast(device, precision):
            clips = solve(ema, noise, prompt, empty)
        (run / "samples").mkdir(exist_ok=True)
        save_grid(run / "samples" / f"step_{state['step']:06d}.gif", to_uint8(clips), PROMPTS, columns=4)
        state["seconds"] = time.perf_counter() - begun
        event = {name: getattr(args, name) for name in ("captions", "tune", "seed")}
        header["history"] = [*history, {"train": args.data, "steps": state["step"], **event}]
        moments = {name: optimiser.state[p] for name, p in trained.items() if p in optimiser.state}
        save_checkpoint(run / "checkpoint", Checkpoint(model, ema, moments, header, state))
        if any("loss" in r for r in records):
            middles = time_of(torch.special.ndtri((torch.arange(T_BINS) + 0.5) / T_BINS))
            plot_losses(run / "loss.png", records, middles)
        state["look_seconds"] = time.perf_counter() - begin  # what the end of the run will take

    if not args.resume:
        if args.base and history != (base := load_model(args.base))[1]["history"]:
            before = Prompts(texts, base[1], base[0].config.llm_dim)
            both = (base[0].to(device), before), (ema, prompts)
            losses = [validation_loss(m, held_out["val_loss"], p).mean().item() for m, p in both]
            print("{}\nfloat32 loss {:.6f} before growth, {:.6f} after".format(tree(history), *losses))
            record(loss_before_growth=losses[0], loss_after_growth=losses[1])
        look()

    if args.compile:  # block by block: all share one compiled graph, which takes half the time to make
        for block in model.blocks:
            block.compile()
    bar = tqdm(desc="training", total=args.steps, unit="step", initial=state["step"])
    losses, logged, looked = [], time.perf_counter(), state["step"]
    while True:
        step, seconds = state["step"], time.perf_counter() - begun
        progress = step / args.steps
        if args.minutes:  # with time left for the last look
            progress = (seconds + state["look_seconds"]) / (60 * args.minutes)
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(peak, step, progress, args.warmup, args.decay, state["lr_before"])
        rows, t, noise, drop = random_draws(args.seed, steps_before + step, shape, len(world))
        x, captions = world.batch(rows)
        streams = [  # one list of captions for each encoder; the first one may lose more of them
            [NULL_PROMPT if d < share else c for c, d in zip(captions, drop.tolist(), strict=True)]
            for share in (DROP + args.drop_text, DROP)[-len(prompts.streams) :]
        ]
        prompt = prompts.batch(*streams, whole=True)
        x, t, noise, *prompt = (v.to(device, non_blocking=True) for v in (x, t, noise, *prompt))
        with autocast(device, precision):
            loss = flow_loss(model, x, t, noise, prompt).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        update_ema(ema, model, steps_before + step, args.ema)
        losses.append(loss.detach())
        state["step"], state["lr"] = step + 1, group["lr"]
        step += 1
        bar.update()
        if step % LOG_EVERY == 0:
            mean, now = torch.stack(losses).mean().item(), time.perf_counter()
            speed = len(losses) * args.batch / (now - logged)
            losses, logged = [], now
            if not math.isfinite(mean):
                raise ValueError(f"the loss is {mean} at step {step}: {DIVERGED}")
            flops = state["flops_before"] + step * step_flops
            record(loss=mean, lr=group["lr"], flops=flops, seconds=now - begun, samples_per_second=speed)
            bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} clips/s")
        if step % args.every == 0:
            look()
            looked = step
            losses, logged = [], time.perf_counter()  # a resumed run starts here with none
    if looked != state["step"]:
        look()
    bar.close()
    last = next(r for r in reversed(records) if "val_loss" in r)
    names = {"val_loss": "validation loss", "old_val_loss": "on what the base had learned"}
    losses = "".join(f", {text} {last[name]:.4f}" for name, text in names.items() if name in last)
    print(f"{run}: {state['step']} steps, {state['seconds'] / 60:.1f} minutes{losses}")
    return run


# --------------------------------------------------------------------------------------------------------
# Command line


def parse_arguments(argv=None):
    """The command line -> its arguments, with all that depends on others filled in."""
    parser = argparse.ArgumentParser(
        description="Train a text-to-video model on the toy world, or grow a trained one and go on. "
        "In brackets: what holds when an option is not given."
    )

    def fail(message):  # as every other error: one line, without the usage
        raise ValueError(f"{message}; see `python train.py --help`")

    parser.error = fail
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", choices=PRESETS, help="size of a new model, see `python dit.py` [tiny]")
    add("--frames", type=int, help="frames of a clip [as the preset or the base]")
    add("--size", type=int, help="pixels per side of a clip [as the preset or the base]")
    add("--depth", type=int, help="blocks of a new model [as the preset]")
    add("--data", choices=("basic", "rich", "both"), help="set of clips [basic; rich if going on]")
    add("--captions", choices=("short", "detailed", "both"), help="[short, detailed or both, as the data]")
    add("--words", default="train", choices=("train", "varied"), help="two words per thing, or five [train]")
    add("--clips", type=int, help="clips in the training set [16384 of basic; 4096, whose captions are long]")
    add("--text", help="text encoder: minilm, a directory or a Hub id [that of the base; minilm]")
    add = parser.add_argument_group("going on from a run, the base (grow.py grows in more ways)").add_argument
    add("--from", dest="base", help="run or checkpoint to go on from [runs/base if growing, else none]")
    add("--grow", metavar="HOW", help="depth (silent copies), width, mlp, llm, or several: depth,llm [off]")
    add("--add", type=int, help="for depth: how many blocks [as many as there are, which doubles the depth]")
    add("--where", choices=("insert", "prefix", "suffix"), help="for depth: where they go [insert]")
    add("--zero", choices=ZEROS, help="for depth: what is zeroed in the copies [gate]")
    add("--llm", default="smollm2", help="LLM for --grow llm: smollm2, a directory or a Hub id [smollm2]")
    add("--llm-features", default="mean", choices=LAYERS, help="which of its layers [mean, that of all]")
    add("--refiner", type=int, default=0, help="blocks in which its features look at each other [0]")
    add(
        "--drop-text", type=float, help=f"share of captions that only the LLM gets to read, if any [{HIDDEN}]"
    )
    add("--tune", choices=TUNE, help="train all, what is new, or adapters beside frozen weights [all]")
    add("--rank", type=int, default=8, help="of the adapters for --tune lora [8]")
    add = parser.add_argument_group("how long and how").add_argument
    add("--steps", type=int, help="optimiser steps [6000; 1200 if going on]")
    add("--minutes", type=float, help="end by the clock instead, with the full learning-rate decay [off]")
    add("--flops", type=float, help="end when as many have been spent, those of the base included [off]")
    add("--batch", type=int, help="clips per step [32]")
    add("--lr", type=float, help="peak learning rate [3e-3 at width 128, less with the root of the width]")
    add("--warmup", type=int, default=100, help="steps from zero, or the base's last rate, to the peak [100]")
    add("--decay", type=float, default=0.3, help="last share of the run that decays to zero; 0: none [0.3]")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights [0.998]")
    add("--seed", type=int, default=0, help="of weights, batches and noise [0]")
    add("--every", type=int, help="steps between samples, validation and checkpoint [1500]")
    add("--quick", action="store_true", help="see that everything works: seconds, nothing learned [off]")
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", help="run directory [runs/base; runs/BASE-depth, -width, -lora, -more if going on]")
    add("--resume", action="store_true", help="go on with the run in --out, with the arguments it had [off]")
    add("--device", default="auto", help="auto, cpu or cuda [auto: a GPU if there is one]")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="[auto: bf16 where it is fast]")
    compiling = argparse.BooleanOptionalAction
    add("--compile", action=compiling, help="torch.compile [on, if there is a C++ compiler]")
    args = parser.parse_args(argv)
    base = args.base or ("runs/base" if args.grow else None)
    names = [part for part in Path(base or "").parts if part != "checkpoint"]
    suffix = args.grow.replace(",", "-") if args.grow else "lora" if args.tune == "lora" else "more"
    args.out = args.out or (f"runs/{names[-1]}-{suffix}" if names else "runs/base")
    if args.resume:
        if not (saved := Path(args.out) / "args.json").is_file():
            raise FileNotFoundError(f"there is no run to resume in {args.out}")
        before = json.loads(saved.read_text()) | {"out": args.out, "resume": True}
        args = parser.parse_args(argv, argparse.Namespace(**before))
        free = {"steps", "minutes", "flops", "every", "device", "precision", "compile"}
        changed = [name for name, v in before.items() if vars(args)[name] != v and name not in free]
        if changed:
            raise ValueError(f"--resume goes on with the arguments the run had: leave out --{changed[0]}")
    for operator in args.grow.split(",") if args.grow else ():
        if operator not in ("depth", "width", "mlp", "llm"):
            raise ValueError(f"no growth is called {operator!r}; there are depth, width, mlp and llm")
    for option in ("add", "where", "zero"):
        if getattr(args, option) is not None and "depth" not in (args.grow or "").split(","):
            raise ValueError(f"--{option} is for --grow depth, which is not given")
    if args.flops and (args.steps or args.minutes) and not args.resume:
        raise ValueError("--flops says how long to train; leave out --steps and --minutes")
    if args.depth and base:
        raise ValueError("--depth is for a new model; --grow depth adds blocks to a trained one")
    if args.refiner < 0 or (args.refiner and "llm" not in (args.grow or "").split(",")):
        raise ValueError("--refiner counts blocks of what --grow llm makes, and is nothing without it")
    data = args.data or ("rich" if base else "basic")
    usual = {"preset": "tiny", "data": data, "batch": 32, "every": 1500, "base": base}
    usual["captions"] = {"basic": "short", "rich": "detailed", "both": "both"}[data]
    usual["clips"] = 16384 if data == "basic" else 4096
    usual |= {"steps": 1200 if base else 6000, "compile": any(map(shutil.which, ("g++", "clang++")))}
    if args.quick:
        usual |= {"preset": "nano", "clips": 256, "batch": 8, "every": 10, "steps": 20, "compile": False}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    numbers = "clips steps batch warmup every lr minutes flops add rank frames size depth"
    for name in numbers.split():
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be more than zero")
    for name, most in (("decay", 1), ("drop_text", 0.9), ("ema", 0.99999)):
        if not 0 <= (value := getattr(args, name) or 0) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be from 0 to {most}")
    return args


if __name__ == "__main__":
    try:
        train(parse_arguments(), START)
    except KeyboardInterrupt:
        sys.exit("stopped; the last checkpoint is kept, and --resume goes on from it")
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
