"""Where a training starts: the base and its growth, the data, the model and optimizer on their device.

train.py calls `set_up` once. It stands in a file of its own so that train.py reads like the algorithm. In
order:

    starting_point   nothing (a new model), the run itself (--resume), or a base, grown as --grow says
    open_data        clips to train on and clips held out, rendered (data.py) or decoded (clips.py)
    prompts          the features of all captions (text_encoder.py)
    build            the model, its EMA, and AdamW with the state it had, on the training device
    pick_batch       without --batch on a GPU, as many clips a step as its memory holds

A base comes with the weights as trained, their EMA and the optimizer state; growth maps all three (grow.py).
If the base learned from other data of the toy world, the loss on those is watched too: what is forgotten.
Frozen weights are set to their EMA values, because they will no longer be averaged.

Left out: several data sets at once, mixtures other than `both`.
"""

import copy
import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

import parallel
from align import align
from clips import FolderDataset, scan
from cost import count_flops, memory_needed
from data import PROMPTS, SETS, ToyDataset
from dit import PRESETS, DiT, set_attention
from grow import grow_state
from machine import RowStore, card, compiles, fits, keep_freed_memory, pick_device, pick_precision
from run import DEFAULTS, Checkpoint, last_training, load_checkpoint
from text_encoder import Prompts, cached_features, located

BASE_LR = 3e-3  # peak learning rate at width 128; it falls with the root of the width
BETAS = (0.9, 0.95)  # of AdamW, whose weight decay is zero: it is Adam
LORA_RANK = 8
TEXT_DROPOUT = 0.5  # share of captions that only an LLM reads, if there is one
VALIDATION_CLIPS = 256
BATCH = 32  # clips of a step
WIDE, WIDE_BATCH = 768, 16  # on a GPU, a model this wide takes fewer
USABLE = 0.9  # share of a GPU's memory: the CUDA context and gaps between tensors take the rest


def starting_point(args) -> Checkpoint | None:
    """What training continues from: the run itself, or the base, grown as --grow says; None for a new
    model."""
    if args.resume:
        start = load_checkpoint(args.out)
        if not start.trainer_state:
            raise ValueError(f"{args.out} has no training state to resume: continue with --from {args.out}")
        return start
    if not args.base:
        return None
    start = load_checkpoint(args.base)
    if parallel.RANK == 0:
        print(f"base: {args.base}")
    if args.text and located(args.text) != located(start.metadata["text_encoder"]):
        raise ValueError(f"{args.base} was trained with --text {start.metadata['text_encoder']}")
    for operator in args.grow.split(",") if args.grow else ():
        start = grow_once(start, operator, args)
    config = start.model.config
    frames, size = args.frames or config.frames, args.size or config.size
    if (frames, size) != (config.frames, config.size):
        start = grow_state(start, "resolution", frames=frames, size=size)
    if args.tune == "lora" and not config.lora_rank:
        start = grow_state(start, "lora", rank=args.rank or LORA_RANK)
    elif args.rank and args.rank != config.lora_rank:
        raise ValueError(f"{args.base} has adapters of rank {config.lora_rank}: leave out --rank")
    return start


def grow_once(start: Checkpoint, operator: str, args) -> Checkpoint:
    """One growth of --grow."""
    if operator == "depth":
        add = args.add or start.model.config.depth
        return grow_state(start, "depth", add=add, where=args.where, zero=args.zero)
    if operator == "llm":
        with parallel.first_process_first():
            llm = located(args.llm)
            dim = cached_features([], llm, args.llm_features).dim
        start.metadata.update(llm=llm, llm_features=args.llm_features)
        return grow_state(start, "llm", llm_dim=dim, seed=args.seed)
    return grow_state(start, operator)


def find_data(name: str) -> str:
    """--data -> a set of the toy world, or the absolute path of a folder, by which --resume finds it from
    elsewhere, and which is never the name of a set. Raises ValueError if there is neither."""
    if not Path(name).is_dir():
        if name in SETS:
            return name
        sets = ", ".join(SETS)
        raise ValueError(f"--data {name!r} is neither a set of the toy world ({sets}) nor a folder")
    if name in SETS and parallel.RANK == 0:
        print(f"note: --data {name} is the folder ./{name} here, not the set of the toy world")
    return str(Path(name).absolute())


def check_data_options(args, defaults):
    """Raise ValueError for options of the toy world with a folder, and of a folder with the toy world."""
    toy = args.data in SETS
    if not 0 <= args.validation <= 0.5:
        raise ValueError(f"--validation is {args.validation}; it must be from 0 (train on all) to 0.5")
    if toy and args.fps:
        raise ValueError("--fps is for a folder of clips; the toy world has its own")
    if toy and args.validation != defaults.validation:
        raise ValueError("--validation is for a folder of clips; the toy world has clips enough")
    if not toy and args.words != defaults.words:
        raise ValueError("--words is for the toy world")


def check_numbers(args):
    """Raise ValueError for numbers out of range."""
    for name in (
        "accumulate", "clips", "steps", "batch", "warmup", "every", "lr", "minutes", "add", "rank", "frames",
        "size", "depth",
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} is {value}; it must be a finite number above zero")
    if args.data in SETS and args.clips is None:
        raise ValueError("--clips is missing: the toy world has as many clips as you like")
    for name, most in (("decay", 1), ("drop_text", 0.9), ("ema", 0.99999), ("max_bad", 1)):
        value = getattr(args, name)
        if not 0 <= value <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be from 0 to {most}")
    if args.fps is not None and not 0.01 <= args.fps <= 1000:
        raise ValueError(f"--fps is {args.fps}; it must be from 0.01 to 1000")
    batch = args.batch or BATCH
    if args.accumulate > batch:
        raise ValueError(f"--accumulate {args.accumulate} is more than the clips of a step, {batch}")
    if args.shard and parallel.WORLD == 1:
        raise ValueError("--shard is for several processes: torchrun --nproc-per-node 2 train.py --shard")


class Data(NamedTuple):
    """What a run learns from and is validated on."""

    clips: ToyDataset | FolderDataset
    held_out: dict[str, ToyDataset | FolderDataset]  # "val_loss", and "old_val_loss": what the base learned
    shown: list[str]  # prompts of the samples

    def texts(self) -> list[str]:
        """All captions and prompts."""
        texts = list(self.shown)
        for dataset in (self.clips, *self.held_out.values()):
            texts += dataset.captions
        return texts

    def fingerprint(self) -> str:
        """It changes with the name or the caption of any clip."""
        parts = [[dataset.names, dataset.captions] for dataset in (self.clips, *self.held_out.values())]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_data(args, config, fps: float, history: list[dict], device, skipped=()) -> Data:
    """The clips to train on, and those held out. Files of a folder that are named in `skipped` are passed
    over. Raises ValueError or OSError with a one-line message."""
    few = min(args.clips or VALIDATION_CLIPS, VALIDATION_CLIPS)
    shape = {"frames": config.frames, "size": config.size}
    if args.data in SETS:
        size = args.clips * 3 * config.frames * config.size**2
        place = device if fits(size, device) else "cpu"
        style = {"caption_style": args.captions, "vocabulary": args.words, "device": place}
        clips = ToyDataset(args.data, args.clips, seed=0, **shape, **style)
        held_out = {"val_loss": ToyDataset(args.data, few, seed=1, **shape, **style)}
        shown = list(PROMPTS)
    else:
        scanned = scan(Path(args.data), **shape, fps=fps, skipped=skipped)
        how = {"caption_style": args.captions, "max_bad": args.max_bad, "validation": args.validation}
        clips = FolderDataset(scanned, "train", count=args.clips, **how)
        held_out = {"val_loss": FolderDataset(scanned, "validation", count=few, **how)}
        shown = list(dict.fromkeys(clips.captions))[: len(PROMPTS)]
    old = last_training(history)
    # A folder that a header names is not opened: a checkpoint may come from anywhere.
    if old and old["train"] in SETS and (old["train"], old["captions"]) != (args.data, args.captions):
        style = {"caption_style": old["captions"], "device": device}
        held_out["old_val_loss"] = ToyDataset(old["train"], few, seed=1, **shape, **style)
    return Data(clips, held_out, shown)


def freeze(model, ema, tune: str, new: list[str]):
    """Leave trainable what `tune` says: "all", "lora" (adapters) or "new" (the parameters named in `new`).
    The others are set to their EMA values. Raises ValueError if nothing is left."""
    for (name, parameter), averaged in zip(model.named_parameters(), ema.parameters(), strict=True):
        trained = tune == "all" or (tune == "lora" and "lora_" in name) or (tune == "new" and name in new)
        if not trained:
            parameter.requires_grad_(False).data.copy_(averaged)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--tune {tune} leaves nothing to train: no growth has made such parameters")


@dataclass
class Training:
    """All that the loop needs. Made once; afterwards only weights, optimizer and lr change."""

    model: DiT  # trained
    ema: DiT  # sampled, evaluated, grown
    network: torch.nn.Module  # the model, or what several processes call in its place
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler  # does nothing but in float16
    lr: torch.Tensor  # 0-dim, on the device, where a captured step reads it
    data: Data
    clips: RowStore  # the clips to train on, uint8 (N, 3, T, H, W)
    captions: torch.Tensor  # (N,) row number of each clip's caption in `prompts`
    prompts: Prompts
    device: torch.device
    precision: torch.dtype | None  # of matrix products
    text_dropout: float  # share of captions that the small encoder does not read, beside the null prompts
    tune: str  # what is trained: "all", "new" or "lora"
    peak: float  # learning rate on the plateau
    lr_before: float  # learning rate at which the base stopped
    flops: int  # of a step
    steps_before: int  # of the base: random draws and the EMA's warm-up continue from there
    metadata: dict  # of the checkpoint; its history ends before this run
    trainer_state: dict  # where the run stands, as it is saved

    def flops_at(self, step: int) -> int:
        """FLOPs spent when the run has done `step` steps, those of the base included."""
        return self.trainer_state["flops_before"] + step * self.flops


def set_up(args, prompts_class=Prompts) -> Training:
    """Everything for a run, from the options of train.py. Fills in args.batch if it is None. Raises
    ValueError or OSError in one line."""
    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    start = starting_point(args)
    metadata = start.metadata if start else {**DEFAULTS, "text_encoder": located(args.text or "minilm")}
    history = metadata["history"]
    if args.resume:
        history = history[:-1]  # the last entry is this run
    fps = DEFAULTS["fps"] if args.data in SETS else args.fps or metadata["fps"]
    metadata = {**metadata, "history": history, "fps": fps}
    config = start.model.config if start else new_config(args)
    if args.drop_text != TEXT_DROPOUT and not (config.llm_dim or args.resume):
        raise ValueError("--drop-text is for a model that reads with an LLM: --grow llm makes one")
    if not args.resume and (args.batch or not card(device)):  # else `pick_batch` will say it
        share = max(1, BATCH // parallel.WORLD)
        say_what_is_trained(args, device, args.batch or share * parallel.WORLD)
    with parallel.first_process_first():
        skipped = start.trainer_state.get("skipped", ()) if args.resume else ()
        data = open_data(args, config, metadata["fps"], history, device, skipped)
    if parallel.RANK == 0:
        for note in data.clips.notes:
            print(f"note: {note}")
        for what, why in data.clips.problems:
            print(f"skipped: {what}: {why}")
    with parallel.first_process_first():
        prompts = prompts_class(data.texts(), metadata, config.llm_dim, device)
    if start is None:
        torch.manual_seed(args.seed % 2**63)
        model = DiT(replace(config, text_dim=prompts.features[0].dim))
        start = Checkpoint(model, copy.deepcopy(model), {}, metadata, {})
    elif args.grow and "llm" in args.grow.split(",") and not args.resume:
        align((start.model, start.ema), prompts, data.clips.captions)
    return build(args, start._replace(metadata=metadata), data, prompts, device)


def name_of(device) -> str:
    """ "NVIDIA H200 with 140 GiB" or "cpu"."""
    found = card(device)
    return f"{found[0]} with {found[1] / 2**30:.0f} GiB" if found else str(device)


def say_what_is_trained(args, device, batch: int):
    """Print the choices that matter, before anything takes long."""
    what = args.base or f"preset {args.preset}"
    length = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"
    options = "--batch and --steps" if args.base else "--preset, --batch and --steps"
    if parallel.RANK == 0:
        print(f"{name_of(device)}: {what}, batch {batch}, {length}; {options} change it", flush=True)


def new_config(args):
    """The config of a new model; the size of the text features is not known yet."""
    config = PRESETS[args.preset]
    changes = {name: getattr(args, name) for name in ("frames", "size", "depth")}
    return replace(config, **{name: value for name, value in changes.items() if value})


def build(args, start: Checkpoint, data: Data, prompts: Prompts, device) -> Training:
    """The model, its EMA and AdamW with the state it had, on the device."""
    model, ema = start.model.train(), start.ema.eval().requires_grad_(False)
    config = model.config
    model.checkpoint_activations = args.checkpoint_activations
    set_attention(model, args.attention)
    tune = args.tune or ("lora" if config.lora_rank else "all")
    freeze(model, ema, tune, start.metadata["new"])
    if not args.shard:
        model.to(device)
        ema.to(device)
    network = parallel.distribute(model, ema, args.shard, device)
    wider = (config.width / 128) ** 0.5
    base_lr = args.lr * wider if args.lr else start.trainer_state.get("base_lr", BASE_LR)
    lr = torch.zeros((), device=device)
    precision = pick_precision(args.precision, device)
    optimizer = make_optimizer(model, start.optimizer_state, lr)
    if args.compile:
        compile_blocks(model, device)
    clips = RowStore(data.clips.videos, device)
    args.batch = args.batch or pick_batch(args, model, clips, prompts, precision)
    state = first_state(args, start, data, base_lr)
    lr.fill_(state["lr"])  # a checkpoint before the first step says it too
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if scaler.is_enabled() and state.get("scaler"):
        scaler.load_state_dict(state["scaler"])
    return Training(
        model=model,
        ema=ema,
        network=network,
        optimizer=optimizer,
        scaler=scaler,
        lr=lr,
        data=data,
        clips=clips,
        captions=prompts.rows(data.clips.captions),
        prompts=prompts,
        device=device,
        precision=precision,
        text_dropout=args.drop_text if config.llm_dim else 0.0,
        tune=tune,
        peak=base_lr / wider,
        lr_before=state["lr_before"],
        flops=args.batch * count_flops(model, prompts.lengths),  # as if all prompts were the longest
        steps_before=sum(event.get("steps", 0) for event in start.metadata["history"]),
        metadata=start.metadata,
        trainer_state=state,
    )


def compile_blocks(model: DiT, device):
    """Compile block by block: all share one compiled graph, which takes half the time to make."""
    if parallel.RANK == 0:
        print("the first step compiles the model: half a minute, once (--no-compile begins at once)")
    if compiles(device):
        for block in model.blocks:
            block.compile()
    elif parallel.RANK == 0:
        print("note: nothing is compiled, so steps are slower: torch.compile fails here. It needs Linux,")
        print("g++ 10 or newer, python3-dev, a path without spaces, and a GPU that is not too old")


def pick_batch(args, model: DiT, clips: RowStore, prompts: Prompts, precision) -> int:
    """Clips of a step for a run without --batch: 32; on a GPU the largest of 32, 16, ... (16, 8, ... for a
    wide model) that fits, and a line that says so. Each of several processes takes the same number, that of
    the smallest card. Raises ValueError if not even one clip fits."""
    found = card(clips.device)
    most = WIDE_BATCH if found and model.config.width >= WIDE else BATCH
    share = max(1, most // parallel.WORLD)
    if found is None:
        return share * parallel.WORLD
    _, memory = found
    what = args.base or f"preset {args.preset}"
    resident = clips.nbytes() + sum(part.flat.nbytes for part in prompts.features if part.resident)
    shards = parallel.WORLD if args.shard else 1
    while share:
        part = math.ceil(share / args.accumulate)
        needed = memory_needed(model, part, prompts.lengths, precision, resident, shards)
        if needed < USABLE * memory:
            break
        share //= 2
    else:
        raise ValueError(
            f"{name_of(clips.device)}: one clip of {what} needs about {needed / 2**30:.1f} GiB; give"
            " --checkpoint-activations, a smaller --preset or --size, or --batch 1 to try it"
        )
    batch = -int(parallel.agree(-share)) * parallel.WORLD
    say_what_is_trained(args, clips.device, batch)
    return batch


def make_optimizer(model, optimizer_state: dict, lr: torch.Tensor) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with the state that they had; new ones begin at step 0."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    on_gpu = lr.is_cuda  # there its step can be captured
    optimizer = torch.optim.AdamW(
        trained.values(), lr, betas=BETAS, weight_decay=0.0, fused=True, capturable=on_gpu
    )
    for name, parameter in trained.items():
        state = {}
        for kind, tensor in optimizer_state.get(name, {}).items():
            on_cpu = kind == "step" and not on_gpu
            state[kind] = tensor.clone() if on_cpu else parallel.slice_like(tensor, parameter)
        if state:
            optimizer.state[parameter] = state
    return optimizer


def first_state(args, start: Checkpoint, data: Data, base_lr: float) -> dict:
    """The trainer state from which the run continues. Raises ValueError if a resumed run had other clips, or
    if another process has."""
    state, fingerprint = start.trainer_state, data.fingerprint()
    number = int(fingerprint[:12], 16)  # a float64 holds it
    if parallel.agree(number) != -parallel.agree(-number):
        raise ValueError(f"the processes do not find the same clips in {args.data}: start them again")
    if args.resume:
        if state.get("data", fingerprint) != fingerprint:
            raise ValueError(
                f"the clips in {args.data} are not those that {args.out} began with; use --from {args.out}"
            )
        return {**state, "data": fingerprint}
    rate = state.get("lr", 0.0)  # where the base left the schedule
    return {
        "step": 0,
        "seconds": 0.0,
        "flops_before": start.metadata["flops"],
        "lr_before": rate,
        "lr": rate,
        "base_lr": base_lr,
        "data": fingerprint,
        "skipped": [what for what, _ in data.clips.problems],
    }
