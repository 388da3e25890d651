"""Rectified flow, and the loop that trains it.

**The method.** Draw a straight line between noise and a clip, x_t = t x + (1 - t) noise, with t = 0 noise and
t = 1 the clip (rectified flow, arXiv 2209.03003). Ask the model for the clip x at the end of the line; the
velocity it implies is (x_predicted - x_t) / (1 - t), the true one is x - noise, and the loss is the squared
difference of the two, which is the squared error of the clip over (1 - t)^2 (JiT, arXiv 2511.13720: predict
x, weigh as velocity; 1 - t is not taken below 0.05). Times are logit-normal, sigmoid(N(-0.8, 0.8)): most of
what is hard happens early, in noise. One caption in ten is replaced by the null prompt, which sample.py needs
for guidance.

**The loop.** AdamW; a learning rate that warms up, stays, and decays to zero at the end (a plateau can be
continued or grown from, a cosine cannot); gradients clipped; an exponential moving average (EMA) of the
weights, which is what is sampled, evaluated and grown; bfloat16 matrix products where the machine is fast at
them.

**Nothing is random but by number.** The batch, the noise, the times and the dropped captions of a step are
functions of (seed, step) alone. There is no generator state to save: a run that was killed and resumed draws
what it would have drawn.

**A run** is a directory: checkpoint/ (model.safetensors with the EMA weights; train_state.* to go on from),
metrics.jsonl, loss.png, samples/step_N.gif, args.json. A checkpoint is written beside and renamed. No pickle
anywhere.

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
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from data import ToyWorld, save_grid
from dit import PRESETS, DiT, find_checkpoint, load_model, save_model
from grow import grow_depth
from sample import autocast, pick_device, pick_precision, solve, to_uint8
from text_encoder import NULL_PROMPT, encode

START = time.perf_counter()
T_BINS = 8  # slices of [0, 1) for the validation loss
LOG_EVERY = 10  # steps per line of metrics.jsonl
PROMPTS = (  # drawn at intervals with fixed noise; the last four hold pairs or words not in training
    "a red cat moving left in a meadow",
    "a blue rocket rising at night",
    "a yellow dog surfing in the desert",
    "a green fish spinning in the city",
    "an orange cat surfing in the snow",
    "a purple ball moving right in the desert",
    "a crimson feline hopping on the prairie",
    "an azure yacht descending after dark",
)

# --------------------------------------------------------------------------------------------------------
# The method


def flow_loss(model, x, text, text_mask, t, noise):
    """The velocity loss of each clip. x (B, 3, T, H, W) in [-1, 1]; text (B, L, D), text_mask (B, L); t (B,)
    in [0, 1); noise like x -> (B,) float32, each the mean over a clip. A model that predicts grey has about
    the variance of the data over (1 - t)^2."""
    s = t.view(-1, 1, 1, 1, 1)
    predicted = model(s * x + (1 - s) * noise, t, text, text_mask)
    return ((predicted.float() - x) / (1 - s).clamp_min(0.05)).square().mean((1, 2, 3, 4))


def random_draws(seed, step, shape, count):
    """All that is random in step `step` of a run: B row numbers below `count`, logit-normal times (B,), noise
    of `shape` (B, 3, T, H, W), and which captions to drop (B,) bool."""
    generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
    rows = torch.randint(count, shape[:1], generator=generator)
    t = torch.sigmoid(-0.8 + 0.8 * torch.randn(shape[0], generator=generator))
    noise = torch.randn(shape, generator=generator)
    return rows, t, noise, torch.rand(shape[0], generator=generator) < 0.1


@torch.no_grad()
def validation_loss(model, world, features, precision=None):
    """The loss on every clip of `world` at fixed times and noise -> (T_BINS,), means over equal slices of [0,
    1): which part of the way from noise to clip is hard. `precision` is the autocast type, None for
    float32."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    losses = []
    for rows in torch.arange(len(world)).split(64):
        x, captions = world.batch(rows)
        t = (rows % T_BINS + torch.rand(len(rows), generator=generator)) / T_BINS
        noise = torch.randn(x.shape, generator=generator)
        inputs = [v.to(device) for v in (x, *features.batch(captions), t, noise)]
        with autocast(device, precision):
            losses.append(flow_loss(model, *inputs).cpu())
    losses = torch.cat(losses)
    return torch.stack([losses[b::T_BINS].mean() for b in range(T_BINS)])


@torch.no_grad()
def update_ema(ema, model, step, decay=0.998):
    """ema += (1 - d) (model - ema). d rises to `decay`, so that the first steps are not dominated by the
    start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def learning_rate(peak, step, progress, warmup, decay=0.3):
    """Warm-up over `warmup` steps, a plateau, and a straight line to zero over the last `decay` of the run;
    `progress` is the share of the run that is over, in [0, 1]."""
    return peak * min(1.0, (step + 1) / warmup) * min(1.0, (1 - progress) / decay)


# --------------------------------------------------------------------------------------------------------
# Files of a run


def save_checkpoint(run: Path, model, ema, optimiser, header, state):
    """Write run/checkpoint whole or not at all: beside it, then renamed. A kill between the two renames
    leaves checkpoint.old, which `find_checkpoint` takes."""
    new, old, final = run / "checkpoint.new", run / "checkpoint.old", run / "checkpoint"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    save_model(new, ema.state_dict(), ema.config, **header)
    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"weights.{name}"] = parameter.detach()
        for key, value in optimiser.state[parameter].items():  # step, exp_avg, exp_avg_sq
            tensors[f"{key}.{name}"] = value
    save_file(tensors, new / "train_state.safetensors")
    (new / "train_state.json").write_text(json.dumps(state, indent=1))
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
    new.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(run: Path, model, ema, optimiser) -> dict:
    """Put the state of run/checkpoint into model, ema and optimiser -> what `state` was when it was saved."""
    directory = find_checkpoint(run)
    saved, _ = load_model(directory)
    ema.load_state_dict(saved.state_dict())
    tensors = load_file(directory / "train_state.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"weights.{name}"])
            optimiser.state[parameter] = {
                key: tensors[f"{key}.{name}"].to(parameter.device)
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
    return json.loads((directory / "train_state.json").read_text())


def plot_losses(run: Path, records):
    """run/loss.png: training loss and validation loss over steps, and validation loss over time t."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [
        (r["step"], sum(r["val_loss_by_t"]) / T_BINS, r["val_loss_by_t"])
        for r in records
        if "val_loss_by_t" in r
    ]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(*zip(*train, strict=True), alpha=0.6, label="training (times drawn as in training)")
    left.plot([v[0] for v in val], [v[1] for v in val], "o-", label="validation of the EMA (times uniform)")
    left.set(xlabel="step", ylabel="velocity loss", yscale="log")
    left.legend()
    for i, (step, _, by_t) in enumerate(val):
        shade = 0.15 + 0.75 * (i + 1) / len(val)
        right.plot(
            [(b + 0.5) / T_BINS for b in range(T_BINS)], by_t, color=str(1 - shade), label=f"step {step}"
        )
    right.set(xlabel="t (0 = noise, 1 = clean)", ylabel="validation loss", yscale="log")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(run / "loss.png", dpi=100)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------------
# The loop


def starting_point(args, run):
    """The model to train and the header of its checkpoints: resumed, grown, continued or new. `model` is None
    for a new one, whose config waits for the text encoder."""
    if args.resume:
        return load_model(run)
    if not args.base:
        return None, {"text_encoder": args.text or "minilm", "history": [], "flops": 0}
    base, header = load_model(args.base)
    if args.text not in (None, header["text_encoder"]):
        raise ValueError(f"{args.base} was trained with --text {header['text_encoder']}, not {args.text}")
    model = grow_depth(base, args.add or base.config.depth) if args.grow else base
    event = {"from": str(args.base), "grow": args.grow, "depth": [base.config.depth, model.config.depth]}
    return model, {**header, "history": [*header["history"], event]}


def train(args):
    """Train as the command line says (see `parse_arguments`) -> the run's directory. Raises ValueError or
    OSError, in one line, for whatever the user can mend."""
    run = Path(args.out)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    if (run / "checkpoint").exists() and not args.resume:
        raise ValueError(f"{run} holds a run already: go on with --resume, or name another with --out")
    model, header = starting_point(args, run)

    # Data and the features of all its captions.
    config = model.config if model else PRESETS[args.preset]
    run.mkdir(parents=True, exist_ok=True)
    world, held_out = (
        ToyWorld(args.data, count, seed, config.frames, config.size, args.captions)
        for count, seed in ((args.clips, 0), (min(args.clips, 256), 1))
    )
    features = encode([*world.captions, *held_out.captions, *PROMPTS], header["text_encoder"])
    null, null_mask = features.batch([NULL_PROMPT], features.max_length)

    torch.manual_seed(args.seed)
    model = (model or DiT(replace(config, text_dim=features.dim))).to(device).train()
    config = model.config
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    peak = args.lr or 3e-3 * (128 / config.width) ** 0.5
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    shape = (args.batch, 3, config.frames, config.size, config.size)
    step_flops = 3 * args.batch * config.flops(features.max_length)  # backward costs twice forward

    # Where the run stands.
    (run / "args.json").write_text(json.dumps(vars(args), indent=1))
    metrics, records = run / "metrics.jsonl", []
    state = {"step": 0, "seconds": 0.0, "flops_before": header["flops"]}
    if args.resume:
        state = load_checkpoint(run, model, ema, optimiser)
        records = [r for r in map(json.loads, metrics.read_text().splitlines()) if r["step"] <= state["step"]]
    metrics.write_text("".join(json.dumps(r) + "\n" for r in records))
    begun = START - state["seconds"]  # time counts from the start of the process: --minutes means minutes

    def record(**entry):
        records.append({"step": state["step"], **entry})
        with metrics.open("a") as file:
            file.write(json.dumps(records[-1]) + "\n")

    def look():
        """Validate, draw samples, save."""
        started = time.perf_counter()
        by_t = validation_loss(ema, held_out, features, precision).tolist()
        record(val_loss=sum(by_t) / T_BINS, val_loss_by_t=by_t)
        noise = torch.randn(len(PROMPTS), *shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        text, mask = (v.to(device) for v in features.batch(PROMPTS))
        with autocast(device, precision):
            clips = solve(ema, noise, text, mask, *(v.to(device) for v in features.batch([NULL_PROMPT])))
        (run / "samples").mkdir(exist_ok=True)
        save_grid(run / "samples" / f"step_{state['step']:06d}.gif", to_uint8(clips), PROMPTS, columns=4)
        state["seconds"] = time.perf_counter() - begun
        header["flops"] = state["flops_before"] + state["step"] * step_flops
        save_checkpoint(run, model, ema, optimiser, header, state)
        if any("loss" in r for r in records):
            plot_losses(run, records)
        return time.perf_counter() - started

    if args.grow and not args.resume:
        base, _ = load_model(args.base)
        before, after = (validation_loss(m, held_out, features).mean().item() for m in (base.to(device), ema))
        print(f"grown to {config.depth} blocks: float32 loss {before:.6f} before, {after:.6f} after")
        record(loss_before_growth=before, loss_after_growth=after)
    look_seconds = 0.0 if args.resume else look()  # what the end of the run will take

    if args.compile:  # block by block: all share one compiled graph, which takes half the time to make
        for block in model.blocks:
            block.compile()
    bar = tqdm(desc="training", total=args.steps, unit="step", initial=state["step"])
    losses, logged, looked = [], time.perf_counter(), state["step"]
    while True:
        step, seconds = state["step"], time.perf_counter() - begun
        progress = (seconds + look_seconds) / (60 * args.minutes) if args.minutes else step / args.steps
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(peak, step, progress, args.warmup)
        rows, t, noise, drop = random_draws(args.seed, step, shape, len(world))
        x, captions = world.batch(rows)
        text, text_mask = features.batch(captions, features.max_length)
        text = torch.where(drop[:, None, None], null, text)
        text_mask = torch.where(drop[:, None], null_mask, text_mask)
        inputs = [v.to(device, non_blocking=True) for v in (x, text, text_mask, t, noise)]
        with autocast(device, precision):
            loss = flow_loss(model, *inputs).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        update_ema(ema, model, step)
        losses.append(loss.detach())
        state["step"] = step = step + 1
        bar.update()
        if step % LOG_EVERY == 0:
            mean, now = torch.stack(losses).mean().item(), time.perf_counter()
            speed = len(losses) * args.batch / (now - logged)
            losses, logged = [], now
            if not math.isfinite(mean):
                raise ValueError(
                    f"the loss is {mean} at step {step}: lower --lr; the last checkpoint is kept"
                )
            flops = state["flops_before"] + step * step_flops
            record(loss=mean, lr=group["lr"], flops=flops, seconds=now - begun, samples_per_second=speed)
            bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} clips/s")
        if step % args.every == 0:
            look_seconds, looked = look(), step
            losses, logged = [], time.perf_counter()  # a resumed run starts here with none
    if looked != state["step"]:
        look()
    bar.close()
    val_loss = next(r["val_loss"] for r in reversed(records) if "val_loss" in r)
    minutes = state["seconds"] / 60
    print(f"{run}: {state['step']} steps, {minutes:.1f} minutes, validation loss {val_loss:.4f}")
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
    add("--data", choices=("basic", "rich"), help="set of clips [basic; rich for a grown model]")
    add("--captions", choices=("short", "detailed"), help="[short for basic, detailed for rich]")
    add(
        "--clips", type=int, help="clips in the training set [16384; 4096 rich ones, whose captions are long]"
    )
    add("--text", help="text encoder: minilm, a directory or a Hub id [that of the base; minilm]")
    add = parser.add_argument_group("growth").add_argument
    add("--grow", choices=("depth",), help="grow the base first; depth: insert zero-gated copies of blocks")
    add("--add", type=int, help="blocks to insert [as many as there are, which doubles the depth]")
    add("--from", dest="base", help="run or checkpoint to go on from [runs/base if growing, else none]")
    add = parser.add_argument_group("how long and how").add_argument
    add("--steps", type=int, help="optimiser steps [6000; 1200 for a grown model]")
    add("--minutes", type=float, help="end by the clock instead, with the full learning-rate decay [off]")
    add("--batch", type=int, help="clips per step [32]")
    add("--lr", type=float, help="peak learning rate [3e-3 at width 128, less with the root of the width]")
    add("--warmup", type=int, default=100, help="steps from no learning rate to the peak [100]")
    add("--seed", type=int, default=0, help="of weights, batches and noise [0]")
    add("--every", type=int, help="steps between samples, validation and checkpoint [1500]")
    add("--quick", action="store_true", help="see that everything works: seconds, nothing learned [off]")
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", help="run directory [runs/base; runs/BASE-depth for a grown model]")
    add("--resume", action="store_true", help="go on with the run in --out, with the arguments it had [off]")
    add("--device", default="auto", help="auto, cpu or cuda [auto: a GPU if there is one]")
    add("--precision", default="auto", choices=("auto", "bf16", "fp32"), help="[auto: bf16 where it is fast]")
    compiling = argparse.BooleanOptionalAction
    add("--compile", action=compiling, help="torch.compile [on, if there is a C++ compiler]")
    args = parser.parse_args(argv)
    base = args.base or ("runs/base" if args.grow else None)
    suffix = "depth" if args.grow else "more"
    args.out = args.out or (f"runs/{Path(base).name}-{suffix}" if base else "runs/base")
    if args.resume:
        saved = Path(args.out) / "args.json"
        if not saved.is_file():
            raise FileNotFoundError(f"there is no run to resume in {args.out}")
        return parser.parse_args(argv, argparse.Namespace(**json.loads(saved.read_text())))
    data = "rich" if args.grow else "basic"
    usual = {"preset": "tiny", "data": data, "batch": 32, "every": 1500, "base": base}
    usual["clips"] = 4096 if (args.data or data) == "rich" else 16384
    usual |= {"steps": 1200 if args.grow else 6000, "compile": any(map(shutil.which, ("g++", "clang++")))}
    if args.quick:
        usual |= {"preset": "nano", "clips": 256, "batch": 8, "every": 10, "steps": 20, "compile": False}
    usual["captions"] = "detailed" if (args.data or data) == "rich" else "short"
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("clips", "steps", "batch", "warmup", "every", "lr", "minutes", "add"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be more than zero")
    return args


if __name__ == "__main__":
    try:
        train(parse_arguments())
    except KeyboardInterrupt:
        sys.exit("stopped; the last checkpoint is kept, and --resume goes on from it")
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
