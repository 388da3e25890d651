"""The command line of train.py: what can be said, what holds if nothing is said, and what makes no sense.

Defaults are the recommended run. Those that depend on others (a run that goes on is shorter, `rich` has long
captions) are filled in here, so that what is written to a run's args.json is all that it was told. `--resume`
takes that file and refuses to change what would make another run of it.

Left out: configuration files, and overriding the fields of a preset one by one.
"""

import argparse
import json
import shutil
from pathlib import Path

from clips import MAX_BAD
from data import SETS
from dit import PRESETS
from grow import ZEROS
from parallel import WORLD
from text_encoder import LAYERS

TUNE = ("all", "new", "lora")
HIDDEN = 0.5  # share hidden from the small encoder when an LLM reads too; as in the study


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
    add("--data", help="clips: basic, rich or both of the toy world, or a folder [basic; rich if going on]")
    add("--captions", choices=("short", "detailed", "both"), help="[short of basic, both of both, detailed]")
    add("--fps", type=float, help="frames per second at which a folder's videos are read [as the base; 8]")
    add("--max-bad", type=float, default=MAX_BAD, help="share of a folder that may be bad [0.1]")
    add("--words", default="train", choices=("train", "varied"), help="two words per thing, or five [train]")
    add(
        "--clips",
        type=int,
        help="clips in the training set [16384 of basic; 4096, whose captions are long; all]",
    )
    add("--text", help="text encoder: minilm, a directory or a Hub id [that of the base; minilm]")
    add = parser.add_argument_group("going on from a run, the base (grow.py grows in more ways)").add_argument
    add("--from", dest="base", help="run or checkpoint to go on from [runs/base if growing, else none]")
    add("--grow", metavar="HOW", help="depth (silent copies), width, mlp, llm, or several: depth,llm [off]")
    add("--add", type=int, help="for depth: how many blocks [as many as there are, which doubles the depth]")
    add("--where", choices=("insert", "prefix", "suffix"), help="for depth: where they go [insert]")
    add("--zero", choices=ZEROS, help="for depth: what is zeroed in the copies [gate]")
    add("--llm", default="smollm2", help="LLM for --grow llm: smollm2, a directory or a Hub id [smollm2]")
    add("--llm-features", default="last", choices=LAYERS, help="which of its layers [last]")
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
    add("--accumulate", type=int, default=1, help="parts, at most, a batch is cut into, to save memory [1]")
    add("--checkpoint-activations", action="store_true", help="save memory: a third more to compute [off]")
    add("--shard", action="store_true", help="by torchrun: cut the model into slices, one per process [off]")
    add("--compile", action=compiling, help="torch.compile [on, if there is a C++ compiler]")
    args = parser.parse_args(argv)
    base = args.base or ("runs/base" if args.grow else None)
    names = [part for part in Path(base or "").parts if part != "checkpoint"]
    suffix = args.grow.replace(",", "-") if args.grow else "lora" if args.tune == "lora" else "more"
    args.out = args.out or (f"runs/{names[-1]}-{suffix}" if names else "runs/base")
    if args.resume:
        if not (saved := Path(args.out) / "args.json").is_file():
            raise FileNotFoundError(f"there is no run to resume in {args.out}")
        try:
            before = dict(json.loads(saved.read_text())) | {"out": args.out, "resume": True, "shard": False}
        except (ValueError, TypeError):
            raise ValueError(f"{saved} is not what train.py has written: it is no JSON object") from None
        args = parser.parse_args(argv, argparse.Namespace(**before))
        free = {"steps", "minutes", "flops", "every", "max_bad", "device", "precision", "compile"}
        free |= {"accumulate", "checkpoint_activations", "shard"}
        changed = [name for name, v in before.items() if vars(args)[name] != v and name not in free]
        if changed:
            name = {"base": "from"}.get(changed[0], changed[0].replace("_", "-"))
            raise ValueError(f"--resume goes on with the arguments the run had: leave out --{name}")
    for operator in args.grow.split(",") if args.grow else ():
        if operator not in ("depth", "width", "mlp", "llm"):
            raise ValueError(f"no growth is called {operator!r}; there are depth, width, mlp and llm")
    for operator, options in {"depth": "add where zero", "llm": "llm llm_features refiner"}.items():
        for option in options.split():
            given = getattr(args, option) != parser.get_default(option) and not args.resume
            if given and operator not in (args.grow or "").split(","):
                raise ValueError(f"--{option.replace('_', '-')} is for --grow {operator}, which is not given")
    if args.flops and (args.steps or args.minutes) and not args.resume:
        raise ValueError("--flops says how long to train; leave out --steps and --minutes")
    if args.depth and base:
        raise ValueError("--depth is for a new model; --grow depth adds blocks to a trained one")
    data = args.data or ("rich" if base else "basic")
    if data not in SETS and not Path(data).is_dir():
        raise ValueError(
            f"--data {data!r} is neither a set of the toy world ({', '.join(SETS)}) nor a folder"
        )
    args.data = data if data in SETS else str(Path(data))  # without a slash at its end
    usual = {"preset": "tiny", "batch": 32, "every": 1500, "base": base}
    usual["captions"] = {"basic": "short", "both": "both"}.get(data, "detailed")
    usual["clips"] = {"basic": 16384, "rich": 4096, "both": 4096}.get(data)
    usual |= {"steps": 1200 if base else 6000, "compile": any(map(shutil.which, ("g++", "clang++")))}
    if args.quick:
        usual |= {
            "preset": "nano",
            "clips": 256 if data in SETS else None,
            "batch": 8,
            "every": 10,
            "steps": 20,
            "compile": False,
        }
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.accumulate > args.batch:
        raise ValueError(f"--accumulate {args.accumulate} is more than the clips of a step, {args.batch}")
    if args.shard and WORLD == 1:
        raise ValueError("--shard is for several processes: torchrun --nproc-per-node 2 train.py --shard")
    numbers = "accumulate clips steps batch warmup every lr minutes flops add rank frames size depth"
    for name in numbers.split():
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be more than zero")
    if args.fps and not 0.01 <= args.fps <= 1000:
        raise ValueError(f"--fps is {args.fps}; it must be from 0.01 to 1000")
    for name, most in (("decay", 1), ("drop_text", 0.9), ("ema", 0.99999), ("max_bad", 1)):
        if not 0 <= (value := getattr(args, name) or 0) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be from 0 to {most}")
    return args
