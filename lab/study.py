"""The study: the claims of the paper, tested at a scale that a laptop can afford. `python -m lab.study`

ModelGrow (arXiv 2412.18966) compares a base model, LoRA, a model with twice the blocks (expansion), and
expansion with a language model. This study asks five questions. In most of them the arms of a seed continue
from one base:

**language** - does a language model help? Every arm continues for as many steps on the same clips and
captions in the same order, with or without a branch that reads the hidden states of an LLM. Half of the
captions are then hidden from the small encoder (train.py). There are two controls. In one the LLM reads the
caption of another clip: what is gained then comes from the parameters. In the other the new branch reads
MiniLM once more: what is gained then comes from a second branch.

**growth** - is it better to grow? The base has learned `basic`, one actor and short captions. The arms
continue with `rich`, several actors and long captions. All arms spend the same number of FLOPs, those of the
base included, so an arm with half the blocks makes twice the steps (isoFLOP); the tables also compare at
equal steps. *continued* is dense continuation. *large from scratch* spends the whole budget on `rich`.

**timing** - when to grow, and does it save anything? Small models learn `rich` for a share of that budget and
are then grown to the size of *large from scratch*. How soon do they reach its final loss?

**longer** - with four times that budget, nearer to the limit of the small model, is it better to grow it than
to continue?

**rates, table** - the paper's table. A base that knows `basic` is trained further on `rich`, with short and
detailed captions: by LoRA, and by dense continuation and expansion, with and without an LLM. All spend the
same FLOPs and decay at the end. Part rates finds the learning rates without an LLM first, on one seed.
**gpu-rates, gpu-table** - the same for a GPU: the base has the preset, data and FLOPs of `python train.py`.

**FLOPs** are those of a training step, forward and backward (`cost.count_flops`), without the frozen text
encoders, whose features are computed once. Every caption counts as if it were the longest of the data, as on
a GPU; a CPU computes somewhat less (`train.prompt_lengths`). The options of an arm may contain `--flops N`,
which train.py does not know: N, less what the base has spent, over the FLOPs of a step is the number of
steps. The learning rate stays on its plateau (no decay), so that a run can be compared at any step of it, and
the averaged weights (EMA) are judged. In part language and in the paper's table only ends are compared: there
it decays.

**What is measured.** The reader scores clips of new scenes (lab/evaluate.py). A prompt of *seen* may be a
caption of the training, those of the held-out sets are not. Losses are those on held-out clips with fixed
noise. Differences are taken within a seed. The spread is over seeds, which
decide weights, batches and noise; clips, captions and test prompts are the same for all.

**What is kept.** One JSON file per arm and seed in results/PART/: arguments, commit of the code, machine,
curve of the loss, scores. Finished arms are skipped, and a run that was killed resumes from its checkpoint.
`--report` makes tables, pictures and verdicts from the JSON files alone (lab/report.py).

Left out: a search for the best learning rate in the first four parts. Larger budgets: lab/scale.py.
"""

import argparse
import copy
import json
import math
import platform
import re
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import filelock
import numpy as np
import torch
import torch.nn.functional as F

from lab.evaluate import evaluate, prove, sample_clips
from lab.parcel import take
from lab.reader import Reader, get_reader
from lab.report import LOSS_ONLY, write_report
from lab.tables import score_table
from lab.verdicts import measure
from machine import pick_device, run_command
from run import load_checkpoint, load_model, option_name, write_atomically
from start import set_up
from text_encoder import Prompts
from train import parse_arguments, train
from video import save_grid, to_uint8


class Arm(NamedTuple):
    """A training run of the study. One whose name begins with an underscore is there only for others to
    continue from, and is not scored."""

    base: str | None  # the arm it continues from
    options: str  # of train.py, and --flops N: the budget, what the base has spent included


VARIED = "--data basic --words varied --clips 8192 --batch 16 --every 2000 "
MORE = VARIED + "--steps 4000 "
LLM = MORE + "--drop-text 0.5 --grow llm --llm-features "
SHARED = MORE + "--drop-text 0 --grow llm --llm-features mean"  # the small encoder reads all captions too
LANGUAGE = {
    "base": Arm(None, VARIED + "--preset nano --steps 8000 --decay 0"),
    "base encoder": Arm("base", MORE),
    "llm last": Arm("base", LLM + "last"),
    "llm middle": Arm("base", LLM + "middle"),
    "llm mean": Arm("base", LLM + "mean"),
    "llm mean, nothing hidden": Arm("base", SHARED),
    "wrong captions, nothing hidden": Arm("base", SHARED),
    "minilm twice": Arm("base", LLM + "mean"),
}
LANGUAGE_SETS = ("seen", "held-out words", "held-out forms", "long")  # that part language is scored on

BUDGET = 2.4e13  # FLOPs: 1,400 steps of *large from scratch*
PLATEAU = "--decay 0 --ema 0.99 --batch 16 --every 200 "
NEW = PLATEAU + "--preset nano "
SPEND = "--data rich --clips 8192 --flops "
RICH = f"{SPEND}{BUDGET:g} "
GROWN = PLATEAU + RICH
DEPTH = GROWN + "--grow depth "
GROWTH = {
    "base": Arm(None, f"{NEW}--data basic --flops {BUDGET / 2:g}"),
    "_untrained": Arm(None, f"{NEW}--data basic --steps 1"),
    "continued": Arm("base", GROWN),
    "lora": Arm("base", GROWN + "--tune lora"),
    "insert": Arm("base", DEPTH),
    "prefix": Arm("base", DEPTH + "--where prefix"),
    "suffix": Arm("base", DEPTH + "--where suffix"),
    "insert, plain copies": Arm("base", DEPTH + "--zero none"),
    "insert, old blocks frozen": Arm("base", DEPTH + "--tune new"),
    "insert, double zero": Arm("base", DEPTH + "--zero both"),
    "width x 2": Arm("base", GROWN + "--grow width"),
    "insert, short captions": Arm("base", DEPTH + "--captions short"),
    "insert + llm": Arm("base", GROWN + "--grow depth,llm"),
    "insert + llm, short captions": Arm("base", GROWN + "--grow depth,llm --captions short"),
    "insert into an untrained base": Arm("_untrained", DEPTH),
    "large from scratch": Arm(None, f"{NEW}{RICH}--depth 8"),
}

# One small model continues from share to share of the budget, and is grown at each.
TIMING = {
    "_small 5 %": Arm(None, f"{NEW}{SPEND}{BUDGET * 0.05:g}"),
    "insert at 5 %": Arm("_small 5 %", DEPTH),
}
for before, share in ((5, 10), (10, 25), (25, 50), (50, 80)):
    TIMING[f"_small {share} %"] = Arm(f"_small {before} %", f"{PLATEAU}{SPEND}{BUDGET * share / 100:g}")
    TIMING[f"insert at {share} %"] = Arm(f"_small {share} %", DEPTH)
TIMING["never grown"] = Arm("_small 80 %", GROWN)
TIMING["_smaller 25 %"] = Arm(None, f"{NEW}--depth 2 {SPEND}{BUDGET / 4:g}")
TIMING["insert at 25 %, x 4"] = Arm("_smaller 25 %", DEPTH + "--add 6")

FAR = f"--every 800 {SPEND}{4 * BUDGET:g}"
LONGER = {
    "_small 50 %": Arm(None, f"{NEW}--every 800 {SPEND}{2 * BUDGET:g}"),
    "insert at 50 %": Arm("_small 50 %", f"{PLATEAU}{FAR} --grow depth"),
    "never grown": Arm("_small 50 %", PLATEAU + FAR),
}

# The paper's table: KINDS of further training, and the learning rates that are tried for them first.
KINDS = {  # options of train.py
    "dense continuation": "",
    "lora": "--tune lora",
    "expansion": "--grow depth",
    "dense continuation + llm": "--grow llm",
    "expansion + llm": "--grow depth,llm",
}
TRIED = {  # at width 128; the base has 3e-3
    "dense continuation": (1.5e-3, 3e-3, 6e-3),
    "lora": (1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2),  # of the first three the largest is best
    "expansion": (1.5e-3, 3e-3, 6e-3),
}
RATES_OF = {"table": "rates", "gpu-table": "gpu-rates"}  # where the learning rates of a part were found
RATES_SEED = 0


def paper_parts(base, further, flops) -> tuple[dict[str, Arm], dict[str, Arm]]:
    """Parts rates and table. base, further: options of train.py; flops: of the base, and those of the arms of
    each part, the base's included. The table's learning rates are added by `arguments_of`."""
    rates = {"base": Arm(None, f"{base} --decay 0 --every 100000 --flops {flops[0]:g}")}
    table = dict(rates)
    for kind, how in KINDS.items():
        options = f"{further} {how} --every 100000"
        table[kind] = Arm("base", f"{options} --flops {flops[2]:g}")
        for rate in TRIED.get(kind, ()):
            rates[f"{kind}, {rate:g}"] = Arm("base", f"{options} --lr {rate:g} --flops {flops[1]:g}")
    return rates, table


RATES, TABLE = paper_parts(
    base="--preset nano --data basic --batch 16 --ema 0.99",
    further="--data rich --captions both --batch 16 --ema 0.99",
    flops=(1.2e13, 1.95e13, 2.7e13),
)
GPU_RATES, GPU_TABLE = paper_parts(
    base="--preset tiny --data basic --batch 64",
    further="--data rich --captions both --batch 64 --clips 32768",
    flops=(1.7e14, 3.7e14, 5.1e14),
)

PARTS = {"language": LANGUAGE, "growth": GROWTH, "timing": TIMING, "longer": LONGER}
PARTS |= {"rates": RATES, "table": TABLE, "gpu-rates": GPU_RATES, "gpu-table": GPU_TABLE}
ON_CPU = ("language", "growth", "timing", "longer")  # what `python -m lab.study` runs

SOLVER_STEPS = 6  # of scored clips; more of them did not change the scores
GALLERY = ("base", "lora", "insert", "insert + llm")
GALLERY_PROMPTS = [
    "an orange cat surfing in the snow",
    "a yellow bird spinning left of a red car moving up at night",
    "three blue fish moving left in the desert",
    "a purple ball bouncing above a green dog that turns red in a meadow",
]


# --------------------------------------------------------------------------------------------------------
# Controls


class WrongPrompts(Prompts):
    """The control of the content: the LLM reads the caption of another clip, always the same one. Only the
    null prompt stays."""

    def __init__(self, texts, metadata, llm_dim, device="cpu"):
        super().__init__(texts, metadata, llm_dim, device)
        if not llm_dim:
            return
        llm = self.features[1]
        order = torch.randperm(len(llm.lengths), generator=torch.Generator().manual_seed(0))
        order = order[order != self.null].to(llm.lengths.device)
        for values in (llm.starts, llm.lengths):  # text order[i] gets the tokens of text order[i - 1]
            values[order] = values[order.roll(1)]


class SamePrompts(Prompts):
    """The control of the branch: instead of an LLM the base's encoder once more, padded with zeros."""

    def __init__(self, texts, metadata, llm_dim, device="cpu"):
        super().__init__(texts, metadata, 0, device)
        if not llm_dim:
            return
        again = copy.copy(self.features[0])
        again.flat = F.pad(again.flat, (0, llm_dim - again.dim))
        again.dim = llm_dim
        self.features.append(again)


PROMPTS_OF = {"wrong captions, nothing hidden": WrongPrompts, "minilm twice": SamePrompts}  # of these arms


# --------------------------------------------------------------------------------------------------------
# One arm


@dataclass(frozen=True)
class Study:
    """Where the study works, and with what."""

    runs: Path
    results: Path
    reader: Reader
    revision: str  # of the code that was loaded, whatever is committed afterwards
    quick: bool = False


def machine_name() -> str:
    """What the numbers are measured on, in words."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    elif info.is_file():
        models = re.findall(r"model name\s*: (.*)", info.read_text())
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def find_revision() -> str:
    """The commit of this code, with a + if a Python file differs from it. Outside of git it is what the file
    REVISION says, if somebody wrote one; else "unknown"."""

    def git(*command):
        here = Path(__file__).parents[1]
        return subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "HEAD").strip()
        changes = git("status", "--porcelain", "-uno", "--", "*.py").strip()
    except (OSError, subprocess.CalledProcessError):
        file = Path(__file__).parents[1] / "REVISION"
        return file.read_text().strip() if file.is_file() else "unknown"
    return commit + ("+" if changes else "")


def arm_path(root: Path, part, arm, seed) -> Path:
    """Where the run of an arm is, or its result without .json: without spaces, commas and the like."""
    words = re.findall(r"[^ ,+%]+", arm)
    return root / part / f"{'-'.join(words)}-{seed}"


def arm_arguments(part, arm, seed, quick=False) -> list[str]:
    """The arguments of an arm, without folders; `quick` replaces its sizes by tiny ones."""
    base, options = PARTS[part][arm]
    if quick:
        options = re.sub(r"--(flops|steps|every|clips) \S+", "", options) + " --quick --clips 16 --steps 5"
        if base is None:
            options += " --frames 4 --size 16"
    return [*options.split(), "--seed", str(seed)]


def result_file(study: Study, part, arm, seed) -> Path:
    """Where the result of an arm is."""
    path = arm_path(study.results, part, arm, seed)
    return path.with_name(path.name + ".json")


def best_rate(study: Study, part, arm) -> float:
    """The learning rate for an arm of the paper's table: of those tried for its kind without an LLM, the one
    with the lowest last loss. Raises FileNotFoundError if they were not tried."""
    kind = arm.removesuffix(" + llm")
    losses = {}
    for rate in TRIED[kind]:
        file = result_file(study, RATES_OF[part], f"{kind}, {rate:g}", RATES_SEED)
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: first run --parts {RATES_OF[part]} --seeds 0")
        losses[rate] = measure(json.loads(file.read_text()), "last")
    return min(losses, key=losses.get)


def arguments_of(study: Study, part, arm, seed) -> list[str]:
    """The arguments of an arm, without folders, with its learning rate."""
    arguments = arm_arguments(part, arm, seed, study.quick)
    if part in RATES_OF and PARTS[part][arm].base and not study.quick:
        arguments += ["--lr", f"{best_rate(study, part, arm):g}"]
    return arguments


def split_budget(arguments) -> tuple[list[str], float | None]:
    """The arguments of an arm -> those of train.py, and the FLOPs of --flops if there are any."""
    if "--flops" not in arguments:
        return arguments, None
    i = arguments.index("--flops")
    return arguments[:i] + arguments[i + 2 :], float(arguments[i + 1])


def steps_for(budget, spent_before, per_step) -> int:
    """How many steps a budget of FLOPs pays for, when the base has spent `spent_before`. Raises ValueError if
    not even one."""
    total = round((budget - spent_before) / per_step)
    if total < 1:
        raise ValueError(
            f"a budget of {budget:.2e} FLOPs is less than the base has spent, {spent_before:.2e}"
        )
    return total


def planned_steps(run: Path, arguments, budget, prompts_class) -> int:
    """How many steps an arm takes with a budget of FLOPs, or with which it was begun."""
    if (run / "args.json").is_file():
        return json.loads((run / "args.json").read_text())["steps"]
    tr = set_up(parse_arguments([*arguments, "--steps", "1"]), prompts_class)
    return steps_for(budget, tr.flops_at(0), tr.flops)


def check_same(run: Path, arguments, free):
    """Raise ValueError if a run was begun with other arguments, apart from those named in `free`."""
    asked = vars(parse_arguments(arguments))
    begun = json.loads((run / "args.json").read_text())
    for name, value in asked.items():
        if name not in ("resume", *free) and value is not None and value != begun.get(name):
            other = option_name(name)
            raise ValueError(f"{run} was begun with another {other}: delete it, or choose another --runs")


def train_until(run: Path, arguments, steps, prompts_class):
    """Train a run to a number of steps, from where it stands. Raises KeyboardInterrupt if it was stopped
    before."""
    started = any((run / name).is_dir() for name in ("checkpoint", "checkpoint.old"))
    if started:
        if load_checkpoint(run).trainer_state["step"] >= steps:
            return
        arguments = ["--resume", "--out", str(run)]
    torch.compiler.reset()  # the graphs of another run do not fit
    train(parse_arguments([*arguments, "--steps", str(steps)]), prompts_class=prompts_class)
    if load_checkpoint(run).trainer_state["step"] < steps:
        raise KeyboardInterrupt


def run_folder(study: Study, part, arm, seed) -> Path:
    """Where the run of an arm is. The base of the paper's table is that of its learning rates."""
    shared = RATES_OF.get(part, part) if arm == "base" else part
    return arm_path(study.runs, shared, arm, seed)


def train_arm(study: Study, part, arm, seed) -> Path:
    """Train an arm, after those it continues from, or what is left of it -> its run. Of several processes
    that need the same arm one trains it, and the others wait. Raises ValueError if a run was begun with other
    arguments."""
    run = run_folder(study, part, arm, seed)
    base = PARTS[part][arm].base
    arguments, budget = split_budget(arguments_of(study, part, arm, seed))
    arguments = [*arguments, "--out", str(run)]
    if base:
        arguments += ["--from", str(train_arm(study, part, base, seed))]
    run.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(run.with_name(f"{run.name}.lock")):
        if (run / "args.json").is_file():
            check_same(run, arguments, ["steps"] if budget else [])
        prompts_class = PROMPTS_OF.get(arm, Prompts)
        print(f"{part}: {arm}, seed {seed}: python train.py {' '.join(arguments)}")
        if budget:
            steps = planned_steps(run, arguments, budget, prompts_class)
        else:
            steps = parse_arguments(arguments).steps
        train_until(run, arguments, steps, prompts_class)
    return run


def run_arm(study: Study, part, arm, seed) -> dict:
    """Train and score an arm, unless its result is there -> what results/PART/ARM-SEED.json holds. Raises
    ValueError if the result there was made with other arguments."""
    file = result_file(study, part, arm, seed)
    arguments = arguments_of(study, part, arm, seed)
    if file.is_file():
        result = json.loads(file.read_text())
        if result["arguments"] != arguments:
            raise ValueError(f"{file} has other arguments: delete it, or choose another --results")
        return result
    run = train_arm(study, part, arm, seed)
    result = {"arm": arm, "seed": seed, "arguments": arguments}
    result |= {"revision": study.revision, "machine": machine_name(), "flops": load_model(run)[1]["flops"]}
    if part not in LOSS_ONLY and not arm.startswith("_"):
        count, steps = (100 if part == "growth" else 200), SOLVER_STEPS
        if study.quick:
            count, steps = 2, 1
        only = LANGUAGE_SETS if part == "language" else ()
        prompts_class = PROMPTS_OF.get(arm, Prompts)
        result["scores"] = evaluate(
            run, study.reader, count, steps, seed=seed, prompts_class=prompts_class, only=only
        )
    result["curve"] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result))
    return result


# --------------------------------------------------------------------------------------------------------
# The command


def write_gallery(study: Study, seed):
    """gallery.gif: clips by the base, LoRA, expansion and expansion with an LLM, side by side, from the same
    noise, as on the paper's page. Nothing is written unless all these arms are there."""
    columns = []
    for arm in GALLERY:
        run = arm_path(study.runs, "growth", arm, seed)
        if not result_file(study, "growth", arm, seed).is_file() or not (run / "checkpoint").is_dir():
            return
        model, metadata = load_model(run)
        prompts = Prompts(GALLERY_PROMPTS, metadata, model.config.llm_dim)
        columns.append(to_uint8(sample_clips(model, prompts, GALLERY_PROMPTS)))
    clips = np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])  # row by row
    texts = [f"{arm}: {prompt}" for prompt in GALLERY_PROMPTS for arm in GALLERY]
    save_grid(study.results / "gallery.gif", clips, texts, columns=len(GALLERY))


def make_parser():
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description="Test the paper's claims at toy scale; writes a JSON file per arm and seed, and a report."
    )
    arms = "; ".join(f"{part} ({', '.join(PARTS[part])})" for part in PARTS).replace("%", "%%")
    add = parser.add_argument
    add("--parts", nargs="+", default=ON_CPU, choices=PARTS, help="questions (the first four)")
    add("--arms", nargs="+", metavar="ARM", help=f"of: {arms} (all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    add("--minutes", type=float, default=math.inf, help="begin no arm after that; call again to continue")
    add("--runs", help="folder for the runs (runs/study, or runs/study-quick)")
    add("--results", help="folder for the JSON files and the report (results, or runs/study-quick)")
    add("--quick", action="store_true", help="all arms in a minute or two; nothing is learned")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--report", action="store_true", help="train nothing, report what is there")
    add("--no-report", action="store_true", help="write no report: several processes would do it at once")
    add = parser.add_argument
    add(
        "--take",
        metavar="OUT",
        help="first put what lab/on_gpu.sh left in OUT into its places; train nothing",
    )
    return parser


def run_study(study: Study, parts, arms, seeds, deadline=math.inf):
    """Train and score what is not there yet. arms: names, or None for all. After `deadline` (by
    time.monotonic) no arm is begun."""
    if not study.quick and not set(parts) <= set(LOSS_ONLY):
        proof = prove(study.reader)
        print(score_table(proof))
        study.results.mkdir(parents=True, exist_ok=True)
        write_atomically(study.results / "reader.json", json.dumps(proof, indent=1))
    for part in parts:
        for seed in seeds:
            for arm in PARTS[part]:
                if (arms is None or arm in arms) and time.monotonic() < deadline:
                    run_arm(study, part, arm, seed)
    if "growth" in parts:
        write_gallery(study, 0)


def main(argv=None):
    """Run what is not there yet, then report: `python -m lab.study`."""
    deadline = time.monotonic()
    args = make_parser().parse_args(argv)
    deadline += 60 * args.minutes
    known = {arm for part in args.parts for arm in PARTS[part]}
    for arm in args.arms or ():
        if arm not in known:
            raise ValueError(f"no arm is called {arm!r}; see `python -m lab.study --help`")
    quick = "runs/study-quick" if args.quick else None
    results = Path(args.results or quick or "results")
    for file in take(Path(args.take)) if args.take else ():
        print(file)
    if not (args.report or args.take):
        runs = Path(args.runs or quick or "runs/study")
        reader = Reader().eval() if args.quick else get_reader(device=pick_device("auto"))
        study = Study(runs, results, reader, find_revision(), args.quick)
        run_study(study, args.parts, args.arms, args.seeds[:1] if args.quick else args.seeds, deadline)
    if not args.no_report:
        print(write_report(results, PARTS))


if __name__ == "__main__":
    run_command(main, "run fewer --arms at a time, or take another machine")
