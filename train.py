"""The training loop: from noise, or from a run that goes on, to a run.

**What is learned** is rectified flow (flow.py). One caption in ten is replaced by the null prompt, which
sample.py needs for guidance. A model that reads with an LLM as well gets others from the LLM alone
(`HIDDEN`): what the small encoder has explained already, nothing would make it look up in the new branch.

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
from another set of the toy world, or other captions, the loss on those is watched too: what is forgotten. (A
folder that its header names is not opened: a checkpoint may come from anywhere.)

**A run** is a directory: checkpoint/ (see checkpoint.py), metrics.jsonl, loss.png, samples/step_N.gif,
args.json. One training runs in it at a time. It may be killed at any moment, and `--resume` goes on from the
last checkpoint to the same bits as if nothing had happened; asked to stop (Ctrl-C, SIGTERM) it finishes its
step and saves. Where a loss or a gradient is not finite it stops, and names the clips of that step.

**Several processes** (parallel.py) share a batch; `--accumulate` cuts it into parts, whose gradients are
summed, and `--checkpoint-activations` computes the insides of a block again when their gradients are needed:
two ways to pay for memory with time, the losses stay the same.

Differences from big trainers: no configuration files, no logger but a file of JSON lines.
"""

import copy
import hashlib
import json
import math
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import filelock
import torch
from tqdm import tqdm

import parallel
from align import align
from arguments import HIDDEN, parse_arguments
from checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model,
    plot_losses,
    save_checkpoint,
    settle,
    tree,
    write_whole,
)
from data import PROMPTS, SETS, open_clips
from dit import PRESETS, DiT, count_flops
from draw import FPS, save_grid
from flow import T_BINS, flow_loss, time_of, validation_loss
from grow import grow_state
from parallel import RANK
from sample import autocast, out_of_memory, pick_device, pick_precision, solve, to_uint8
from text_encoder import NULL_PROMPT, Prompts, encode

START = time.perf_counter()  # of the process: --minutes means minutes
DIVERGED = "the last checkpoint is kept; a new run, or one --from it, needs a lower --lr"
DROP = 0.1  # share of captions replaced by the null prompt, for guidance
LOG_EVERY = 10  # steps per line of metrics.jsonl

# --------------------------------------------------------------------------------------------------------
# Pieces of the loop


def random_draws(seed, step, shape, count):
    """All that is random in step `step` of a run: B row numbers below `count`, logit-normal times (B,),
    noise of `shape` (B, 3, T, H, W), and uniform numbers (B,) that decide which captions to drop."""
    generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
    rows = torch.randint(count, shape[:1], generator=generator)
    t = time_of(torch.randn(shape[0], generator=generator))
    noise = torch.randn(shape, generator=generator)
    return rows, t, noise, torch.rand(shape[0], generator=generator)


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
            with parallel.one_first():
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


@contextmanager
def stoppable():
    """Within it Ctrl-C and SIGTERM end nothing, but are written down in the list that it gives; a second
    Ctrl-C is Ctrl-C again."""
    stops = []

    def stop(number, _):
        stops.append(number)
        signal.signal(number, before[number])

    here = threading.current_thread() is threading.main_thread()  # no other thread may ask for signals
    numbers = (signal.SIGINT, signal.SIGTERM) if here else ()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(args, started=None, read=Prompts):
    """Train as the command line says (see `parse_arguments`) -> the run's directory. The clock of --minutes
    began at `started` (`time.perf_counter`), by default now. `read` is how prompts become features. Raises
    ValueError or OSError, in one line, for whatever the user can mend, and SystemExit after a stop."""
    parallel.join(args.batch, args.device)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(Path(args.out) / "lock", timeout=0) if RANK == 0 else nullcontext():
            return train_alone(args, started or time.perf_counter(), read)
    except filelock.Timeout:
        raise ValueError(f"another process is training in {args.out}: name another with --out") from None


def train_alone(args, started, read):
    """`train`, in a directory that no other process trains in."""
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
    header = start.header if start else {"text_encoder": args.text or "minilm", "history": [], "flops": 0}
    history = header["history"][:-1] if args.resume else header["history"]
    header["fps"] = args.fps = args.fps or header.get("fps", FPS)
    clip, folder = (config.frames, config.size), {"fps": args.fps, "max_bad": args.max_bad}
    with parallel.one_first():
        world = open_clips(args.data, "train", args.clips, *clip, args.captions, args.words, **folder)
    for what, why in world.problems:
        print(f"skipped: {what}: {why}")
    few = min(args.clips or 256, 256)
    held_out = {
        "val_loss": open_clips(args.data, "validation", few, *clip, args.captions, args.words, **folder)
    }
    old = [event for event in history if "train" in event][-1:]
    known = (*SETS, args.data)
    if (
        old
        and old[0]["train"] in known
        and (old[0]["train"], old[0]["captions"]) != (args.data, args.captions)
    ):
        held_out["old_val_loss"] = open_clips(
            old[0]["train"], "validation", few, *clip, old[0]["captions"], **folder
        )
    clips = [[w.names, w.captions] for w in (world, *held_out.values())]
    identity = hashlib.sha256(json.dumps(clips).encode()).hexdigest()
    if args.resume and start.state.get("data", identity) != identity:
        raise ValueError(
            f"the clips in {args.data} are not those that {run} began with; go on with --from {run}"
        )
    shown = list(PROMPTS) if args.data in SETS else list(dict.fromkeys(world.captions))[: len(PROMPTS)]
    texts = [*world.captions, *(c for w in held_out.values() for c in w.captions), *shown]
    with parallel.one_first():
        prompts = read(texts, header, config.llm_dim)
    if "llm" in (args.grow or "").split(",") and not args.resume:
        align((start.model, start.ema), prompts, world.captions)
    lengths = [stream.max_length for stream in prompts.streams]

    if start is None:
        torch.manual_seed(args.seed)
        model = DiT(replace(config, text_dim=prompts.streams[0].dim))
        start = Checkpoint(model, copy.deepcopy(model), {}, header, {})
    model, ema, moments, header, state = start
    model.train().checkpoint_activations = args.checkpoint_activations
    ema.eval().requires_grad_(False)
    config = model.config
    args.tune = args.tune or ("lora" if config.lora_rank else "all")
    freeze(model, ema, args.tune, header.get("new", ()))
    step_flops = args.batch * count_flops(model, lengths)  # as if each prompt were as long as the longest
    if args.shard:  # what is trained is cut into slices; process 0 looks at, and saves, what it gathers
        whole = copy.deepcopy(model).to("cpu" if RANK == 0 else "meta")
        whole_ema = copy.deepcopy(ema).to(device if RANK == 0 else "meta")
    else:
        whole, whole_ema = model.to(device), ema.to(device)
    network = parallel.distribute(model, ema, args.shard, device)
    wider = (config.width / 128) ** 0.5  # the peak is kept from run to run, but falls with this
    peak_at_128 = args.lr * wider if args.lr else state.get("peak_at_128", 3e-3)
    peak = peak_at_128 / wider
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), peak, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for name, parameter in trained.items():
        if name in moments:
            mine = {kind: parallel.slice_like(tensor, parameter) for kind, tensor in moments[name].items()}
            optimiser.state[parameter] = mine
    shape = (args.batch, 3, config.frames, config.size, config.size)

    # Where the run stands.
    metrics, records = run / "metrics.jsonl", []
    if args.resume:
        lines = metrics.read_text().splitlines(keepends=True)  # the last one may have been cut off
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        records = [r for r in records if r["step"] <= state["step"]]
    else:
        rate = state.get("lr", 0.0)
        state = {"step": 0, "seconds": 0.0, "look_seconds": 0.0, "flops_before": header["flops"]}
        state |= {"lr_before": rate, "lr": rate, "peak_at_128": peak_at_128, "data": identity}
    if args.flops:
        args.steps = round((args.flops - state["flops_before"]) / step_flops)
        if args.steps < 1:
            raise ValueError(
                f"--flops counts those of the base too, {state['flops_before']:.2e}: ask for more"
            )
    steps_before = sum(event.get("steps", 0) for event in history)
    if RANK == 0:
        write_whole(run / "args.json", json.dumps(vars(args), indent=1))
        write_whole(metrics, "".join(json.dumps(r) + "\n" for r in records))
    losses = [torch.tensor(loss, device=device) for loss in state.pop("losses", ())]  # not written down yet
    begun = started - state["seconds"]

    def record(**entry):
        records.append({"step": state["step"], **entry})
        if RANK == 0:
            with metrics.open("a") as file:
                file.write(json.dumps(records[-1]) + "\n")

    def check():
        """Raise ValueError if a loss since the last line of metrics is not finite, in any process."""
        losses[:] = parallel.mean(torch.stack(losses)).unbind() if losses else ()
        for i, loss in enumerate(loss.item() for loss in losses):
            if not math.isfinite(loss):
                step = state["step"] - len(losses) + i
                rows = random_draws(args.seed, steps_before + step, shape, len(world))[0]
                names = "; ".join(world.names[row] for row in rows)
                raise ValueError(
                    f"the loss or its gradient is {loss} at step {step + 1}: {DIVERGED} ({names})"
                )

    def save():
        check()
        header["flops"] = state["flops_before"] + state["step"] * step_flops
        state["seconds"] = time.perf_counter() - begun
        event = {name: getattr(args, name) for name in ("captions", "tune", "seed")}
        header["history"] = [*history, {"train": args.data, "steps": state["step"], **event}]
        parallel.gather(model, whole)
        parallel.gather(ema, whole_ema)
        moments = {
            name: {kind: parallel.collect(tensor) for kind, tensor in optimiser.state[parameter].items()}
            for name, parameter in trained.items()
            if parameter in optimiser.state
        }
        pending = {"losses": [loss.item() for loss in losses]}
        if RANK == 0:
            settle(metrics)
            saved = Checkpoint(whole, whole_ema, moments, header, state | pending)
            save_checkpoint(run / "checkpoint", saved)

    def look():
        """Validate, draw samples, save."""
        check()
        begin = time.perf_counter()
        parallel.gather(ema, whole_ema)
        if RANK == 0:
            validate()
        save()
        if RANK == 0 and any("loss" in r for r in records):
            middles = time_of(torch.special.ndtri((torch.arange(T_BINS) + 0.5) / T_BINS))
            plot_losses(run / "loss.png", records, middles)
        state["look_seconds"] = time.perf_counter() - begin  # what the end of the run will take

    def validate():
        """The loss on clips that are not trained on, and samples."""
        entry = {"flops": state["flops_before"] + state["step"] * step_flops}
        for name, clips in held_out.items():
            by_t = validation_loss(whole_ema, clips, prompts, precision).tolist()
            entry |= {name: sum(by_t) / T_BINS, f"{name}_by_t": by_t}
        if not math.isfinite(entry["val_loss"]):
            raise ValueError(f"the weights are not finite at step {state['step']}: {DIVERGED}")
        record(**entry)
        noise = torch.randn(len(shown), *shape[1:], generator=torch.Generator().manual_seed(0)).to(device)
        prompt, empty = ([v.to(device) for v in prompts.batch(p)] for p in (shown, [NULL_PROMPT]))
        with autocast(device, precision):
            clips = solve(whole_ema, noise, prompt, empty)
        (run / "samples").mkdir(exist_ok=True)
        save_grid(run / "samples" / f"step_{state['step']:06d}.gif", to_uint8(clips), shown, columns=4)

    if not args.resume:
        if RANK == 0 and args.base and history != (base := load_model(args.base))[1]["history"]:
            before = Prompts(texts, base[1], base[0].config.llm_dim)
            both = (base[0].to(device), before), (whole_ema, prompts)
            sides = [validation_loss(m, held_out["val_loss"], p).mean().item() for m, p in both]
            print("{}\nfloat32 loss {:.6f} before growth, {:.6f} after".format(tree(history), *sides))
            record(loss_before_growth=sides[0], loss_after_growth=sides[1])
        look()

    if args.compile:  # block by block: all share one compiled graph, which takes half the time to make
        for block in model.blocks:
            block.compile()
    looked = max((r["step"] for r in records if "val_loss" in r), default=state["step"])
    logged = state["step"], time.perf_counter()
    bar = tqdm(desc="training", total=args.steps, unit="step", initial=state["step"], disable=RANK > 0)
    with bar, stoppable() as stops:
        while True:
            step, seconds = state["step"], time.perf_counter() - begun
            progress = step / args.steps
            if args.minutes:  # with time left for the last look
                progress = (seconds + state["look_seconds"]) / (60 * args.minutes)
            progress, stopped = parallel.agree(progress, len(stops))
            if progress >= 1 or stopped:
                break
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(peak, step, progress, args.warmup, args.decay, state["lr_before"])
            rows, t, noise, drop = random_draws(args.seed, steps_before + step, shape, len(world))
            total, parts = 0.0, parallel.share(torch.arange(args.batch)).chunk(args.accumulate)
            for part in parts:
                (x, captions), drops = world.batch(rows[part]), drop[part].tolist()
                streams = [  # one list of captions for each encoder; the first one may lose more of them
                    [NULL_PROMPT if d < hide else c for c, d in zip(captions, drops, strict=True)]
                    for hide in (DROP + args.drop_text, DROP)[-len(prompts.streams) :]
                ]
                prompt = prompts.batch(*streams, few=True)
                x, *prompt = (v.to(device, non_blocking=True) for v in (x, *prompt))
                with parallel.not_yet(network) if part is not parts[-1] else nullcontext():
                    with autocast(device, precision):
                        loss = flow_loss(network, x, t[part].to(device), noise[part].to(device), prompt).sum()
                    loss = loss / args.batch * parallel.WORLD
                    loss.backward()
                total = total + loss.detach()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            update_ema(ema, model, steps_before + step, args.ema)
            losses.append(total + 0 * parallel.whole(norm))  # not a number if the gradient is not finite
            step += 1
            state["step"], state["lr"] = step, group["lr"]
            bar.update()
            if step % LOG_EVERY == 0:
                check()
                mean, now = torch.stack(losses).mean().item(), time.perf_counter()
                speed = (step - logged[0]) * args.batch / (now - logged[1])
                logged = step, now
                losses.clear()
                flops = state["flops_before"] + step * step_flops
                record(loss=mean, lr=group["lr"], flops=flops, seconds=now - begun, samples_per_second=speed)
                bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} clips/s")
            if step % args.every == 0:
                look()
                looked, logged = step, (step, time.perf_counter())
        if looked != state["step"] and not stopped:
            look()
    if stopped:
        save()
        print(f"{run}: stopped and saved at step {state['step']} of {args.steps}; --resume goes on from it")
        parallel.leave()
        sys.exit(0)
    if RANK == 0:
        last = next(r for r in reversed(records) if "val_loss" in r)
        names = {"val_loss": "validation loss", "old_val_loss": "on what the base had learned"}
        losses = "".join(f", {text} {last[name]:.4f}" for name, text in names.items() if name in last)
        print(f"{run}: {state['step']} steps, {state['seconds'] / 60:.1f} minutes{losses}")
    parallel.leave()
    return run


if __name__ == "__main__":
    try:
        train(parse_arguments(), START)
    except KeyboardInterrupt:
        print("stopped; what was saved before is kept", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # whatever a user can mend
        if out_of_memory(error):
            error = (
                "out of memory: lower --batch or raise --accumulate, give --checkpoint-activations, or take a"
                " smaller --preset, --size or --frames"
            )
        elif parallel.lost(error):
            error = f"process {RANK}: another one of this run has ended; --resume goes on from what it saved"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
