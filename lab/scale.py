"""The window of growth: from which budget on does growing pay, and until when? `python -m lab.scale`

A small model learns fast per FLOP at first, and a large one reaches a lower loss in the end. Growing can beat
never growing only where the small model's loss falls more slowly per FLOP than the grown one's would (Staged
Training, arXiv 2203.06211). So the answer depends on the budget. Here every arm is trained with several
budgets, which count training FLOPs (forward and backward, `cost.count_flops`), those of the base included:

    never grown             4 blocks (preset nano)
    large from scratch      8 blocks; and once more with the FLOPs that *doubled at 50 %* spends after growth
    doubled at 25 %, 50 %   4 blocks for that share of the budget, then 8, inserted (grow.py)
    half more at ...        4 blocks, then 6
    ..., plain copies       without zero-initialized gates: growth that keeps the weights but not the function

**One plateau serves all budgets.** The learning rate is constant, and the last fifth of a budget decays to
zero (warmup-stable-decay, as in arXiv 2511.04981). A run with a smaller budget is therefore the same as one
with a larger budget, until it decays. So each seed has one plateau of 4 blocks and one of 8. Checkpoints are
kept at the steps (marks) where an arm leaves it: to decay, or to grow. What is random in a step depends on
the seed and the step alone (train.py). So each arm has the same bits as the run of train.py whose arguments
its result names: tests/test_scale.py shows that on a CPU.

**Data.** Set `rich` with detailed captions. There are enough clips that the largest budget shows none more
than ten times on average, if the memory holds them. The loss is that of the averaged weights (EMA) on clips
that are held out, at fixed noise.

**Small budgets.** The warm-up has as many steps for all sizes. Batches are small, so that it is a small share
of the smallest budget: 4 % of *never grown*, 7 % of *large from scratch*, 14 % of that with the additional
compute only. The EMA reaches back some 100 steps, fewer than the decay has. `--tune` compares at a quarter of
that budget, where the warm-up takes up to 28 %, and the decay of 8 blocks has 71 steps.

**At once.** Clips and their features are made once and lie on the device for all arms. On a GPU several arms
train at the same time, each in a CUDA stream with its own recorded step: a step of these models does not fill
a GPU. On a CPU the same code trains one after the other.

**What is kept.** One JSON file per budget, arm and seed. What is there is skipped, and what --minutes or
Ctrl-C stopped continues where it was, so the command can be called again and again. Budgets come from small
to large, and all seeds of one before the next. If an arm diverges, the others still come to their end.
`python -m lab.study --report` makes the figure and the tables from these files (lab/report.py).

Left out: the seconds that an arm takes, since arms share the device; sizes above preset nano; growth twice.
"""

import argparse
import contextlib
import copy
import gc
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from cost import count_flops
from dit import PRESETS, DiT
from flow import T_BINS, loss_by_timestep, validation_batches
from lab.study import BUDGET, find_revision, machine_name
from machine import RESIDENT_SHARE, pick_device, run_command
from run import DEFAULTS, Checkpoint, Diverged, Signals, lock, save_checkpoint, write_atomically
from start import BASE_LR, Data, Training, build, new_config, open_data, starting_point
from text_encoder import NULL_PROMPT, Features, Prompts, encode, located, make_encoder
from train import Batch, learning_rate, make_step, parse_arguments, random_batch, update_ema
from validate import snapshot

DECAY = 0.2  # last share of a budget, in which the learning rate decays to zero
DECAY_POINTS = 8  # of a curve, in that share
REPEATS = 10  # how often a clip is seen, on average
AT_ONCE = {"cuda": 6}  # arms; elsewhere one. In a pilot on an H200 six took 0.55 of the time of one by one
SMALL, MIDDLE, LARGE = 4, 6, 8  # blocks
RATES = {SMALL: BASE_LR, MIDDLE: BASE_LR, LARGE: BASE_LR}  # peak learning rates; `--tune` compares others
TUNED = (0.5, 1, 2)  # times these

OPTIONS = "--data rich --captions detailed --ema 0.99"  # of train.py, for all arms
NEW = "--preset nano"  # for new models
QUICK, QUICK_NEW = "--quick", "--frames 4 --size 16"
QUICK_CLIPS, QUICK_BATCH, QUICK_UNIT = 64, 4, 1.2e10  # 20 steps of the small model


class Arm(NamedTuple):
    """A way to spend a budget."""

    depth: int  # blocks at the end
    grown_at: float = 0.0  # share of the budget that the small model spends first; 0: there is none
    zero: str = ""  # what is zero in the new blocks, as for train.py --zero
    share: float = 1.0  # of the budget that is spent


ARMS = {
    "never grown": Arm(SMALL),
    "large from scratch": Arm(LARGE),
    "large from scratch, additional compute": Arm(LARGE, share=0.5),
    "doubled at 50 %": Arm(LARGE, 0.5, "gate"),
    "doubled at 25 %": Arm(LARGE, 0.25, "gate"),
    "doubled at 50 %, plain copies": Arm(LARGE, 0.5, "none"),
    "doubled at 25 %, plain copies": Arm(LARGE, 0.25, "none"),
    "half more at 50 %": Arm(MIDDLE, 0.5, "gate"),
    "half more at 25 %": Arm(MIDDLE, 0.25, "gate"),
    "half more at 50 %, plain copies": Arm(MIDDLE, 0.5, "none"),
    "half more at 25 %, plain copies": Arm(MIDDLE, 0.25, "none"),
}

# --------------------------------------------------------------------------------------------------------
# What all arms share


class SharedData(Data):
    """Data whose fingerprint is computed once: with many clips that takes a second."""

    __hash__ = object.__hash__
    fingerprint = cache(Data.fingerprint)


class PromptsInMemory(Prompts):
    """Prompts whose features are not checked and not written to the cache. Of hundreds of thousands of
    captions that would take longer than reading them does on a GPU."""

    def __init__(self, texts, metadata, device):
        texts = sorted({NULL_PROMPT, *texts})
        encoder = make_encoder(metadata["text_encoder"], device=device)
        self.features = [Features(texts, *encode(texts, encoder)).to(device)]
        self.null = self.features[0].row_of[NULL_PROMPT]


@dataclass(frozen=True)
class Scale:
    """What all arms share."""

    results: Path
    runs: Path  # for the checkpoints of the plateaus
    options: list[str]  # of train.py
    new_options: list[str]  # of train.py, for new models
    rates: dict[int, float]  # {blocks: peak learning rate}
    unit: float  # FLOPs
    step_flops: dict[int, int]  # {blocks: FLOPs of a step}
    data: Data
    prompts: Prompts
    batches: list[tuple]  # of flow.validation_batches
    device: torch.device
    revision: str
    machine: str


def clips_for(flops: float, device) -> int:
    """How many clips the small model needs for a budget of `flops`, so that it sees none more than REPEATS
    times on average, or as many as fit. A clip counts as if its caption had 64 tokens. Detailed captions
    are longer, and a longer one costs more FLOPs, so there are rather too many clips than too few."""
    config = replace(PRESETS["nano"], depth=SMALL)
    seen = flops / count_flops(DiT(config), [64])
    wanted = math.ceil(seen / REPEATS)
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[1]
    else:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    pixels = 3 * config.frames * config.size**2
    features = 2 * 100 * config.text_dim  # bfloat16; nearly all captions have fewer than 100 tokens
    most = int(RESIDENT_SHARE * memory / (pixels + features))
    count = min(wanted, most)
    note = "" if count == wanted else f"; {wanted} do not fit into memory"
    print(f"{count} clips: the largest budget shows each {seen / count:.1f} times on average{note}")
    return count


def shared_options(args, device) -> tuple[list[str], list[str]]:
    """Options of train.py for all arms, and further ones for new models, from those of the command."""
    if args.quick:
        size = f"--clips {args.clips or QUICK_CLIPS} --batch {QUICK_BATCH}"
        return f"{QUICK} {OPTIONS} {size}".split(), QUICK_NEW.split()
    clips = args.clips or clips_for(max(args.budgets) * BUDGET, device)
    return f"{OPTIONS} --clips {clips} --batch {args.batch}".split(), NEW.split()


def open_scale(args) -> Scale:
    """Clips, features and costs, from the options of the command."""
    device = pick_device(args.device)
    options, new_options = shared_options(args, device)
    train_args = parse_arguments([*options, *new_options])
    metadata = first_metadata(train_args)
    config = new_config(train_args)
    data = SharedData(*open_data(train_args, config, metadata["fps"], [], device))
    texts = data.texts()
    on_gpu = device.type == "cuda"
    prompts = PromptsInMemory(texts, metadata, device) if on_gpu else Prompts(texts, metadata, 0)
    costs = {}
    for depth in RATES:
        model = DiT(replace(config, depth=depth, text_dim=prompts.features[0].dim))
        costs[depth] = train_args.batch * count_flops(model, prompts.lengths)
    gc.freeze()  # recording a step collects garbage: it need not search the captions
    folder = "runs/scale-quick" if args.quick else "runs/scale"
    return Scale(
        results=Path(args.out or (folder if args.quick else "results/scale")),
        runs=Path(args.runs or folder),
        options=options,
        new_options=new_options,
        rates=dict(zip(RATES, args.rates, strict=True)),
        unit=QUICK_UNIT if args.quick else BUDGET,
        step_flops=costs,
        data=data,
        prompts=prompts,
        batches=list(validation_batches(data.held_out["val_loss"], prompts, device)),
        device=device,
        revision=find_revision(),
        machine=machine_name(),
    )


def first_metadata(args) -> dict:
    """The metadata of a new model."""
    return {**DEFAULTS, "text_encoder": located(args.text or "minilm")}


# --------------------------------------------------------------------------------------------------------
# Schedules


class Schedule(NamedTuple):
    """The steps of an arm."""

    plateau: int  # blocks of the plateau that it leaves
    mark: int  # step at which it leaves it
    steps: int  # in all; for a grown model, since its growth
    decay: float  # last share of them, in which the learning rate decays


def schedule(scale: Scale, arm: Arm, budget: float) -> Schedule:
    """How an arm spends `budget` units. Raises ValueError if that is less than a step of each model."""
    flops = budget * scale.unit * arm.share
    mark = round(flops * arm.grown_at / scale.step_flops[SMALL])
    left = flops - mark * scale.step_flops[SMALL]
    steps = round(left / scale.step_flops[arm.depth])
    if steps < 1 or (arm.grown_at and mark < 1):
        raise ValueError(f"a budget of {budget:g} does not pay for a step of each model")
    if not arm.grown_at:
        return Schedule(arm.depth, int((1 - DECAY) * steps), steps, DECAY)
    return Schedule(SMALL, mark, steps, DECAY * flops / left)


class Job(NamedTuple):
    """A stretch of training: of a plateau from its last checkpoint to the next marks, or of an arm from its
    mark to its end."""

    arguments: list[str]  # of train.py
    start: Path | None  # the checkpoint from which it continues; None: a new model
    stop: int  # step at which it ends
    steps: float  # of the schedule; infinite on a plateau
    decay: float
    arm: str = ""  # empty: a plateau
    budget: float = 0.0
    seed: int = 0
    base: tuple[str, ...] = ()  # arguments of train.py for the base of a grown arm
    folder: Path | None = None  # for the checkpoints of a plateau
    marks: tuple[int, ...] = ()  # steps at which they are kept

    @property
    def grows(self) -> bool:
        """Whether the model is grown at the start."""
        return "--grow" in self.arguments

    @property
    def title(self) -> str:
        """For messages."""
        return f"budget {self.budget:g}, {self.arm}, seed {self.seed}" if self.arm else str(self.folder)


def new_arguments(scale: Scale, depth, seed, steps, decay) -> list[str]:
    """The arguments of train.py for a model from scratch."""
    rate = repr(scale.rates[depth])
    training = ["--depth", str(depth), "--lr", rate, "--seed", str(seed)]
    return [*scale.options, *scale.new_options, *training, "--steps", str(steps), "--decay", repr(decay)]


def grown_arguments(scale: Scale, arm: Arm, seed, steps, decay) -> list[str]:
    """The arguments of train.py for a grown model, without --from."""
    growth = ["--grow", "depth", "--add", str(arm.depth - SMALL), "--zero", arm.zero]
    training = ["--lr", repr(scale.rates[arm.depth]), "--seed", str(seed)]
    return [*scale.options, *growth, *training, "--steps", str(steps), "--decay", repr(decay)]


def plateau_folder(scale: Scale, depth, seed) -> Path:
    """Where the checkpoints of a plateau are: step-N for each mark."""
    return scale.runs / f"plateau-{depth}-{seed}"


def result_file(scale: Scale, job: Job) -> Path:
    """Where the result of an arm is."""
    words = job.arm.replace(",", "").replace(" %", "").split()
    return scale.results / f"{job.budget:g}-{'-'.join(words)}-{job.seed}.json"


def arm_job(scale: Scale, name, budget, seed) -> Job:
    """The job of an arm."""
    arm = ARMS[name]
    depth, mark, steps, decay = schedule(scale, arm, budget)
    base = ()
    arguments = new_arguments(scale, depth, seed, steps, decay)
    if arm.grown_at:
        base = tuple(new_arguments(scale, SMALL, seed, mark, 0.0))
        arguments = grown_arguments(scale, arm, seed, steps, decay)
    start = plateau_folder(scale, depth, seed) / f"step-{mark}" if mark else None
    return Job(arguments, start, steps, steps, decay, name, budget, seed, base)


def is_done(scale: Scale, job: Job) -> bool:
    """Whether the result of an arm is there. Raises ValueError if it was made with other arguments."""
    file = result_file(scale, job)
    if not file.is_file():
        return False
    result = json.loads(file.read_text())
    if (result["arguments"], result["base"]) != (job.arguments, list(job.base)):
        raise ValueError(f"{file} was made with other --clips, --batch or --rates: choose another --out")
    return True


def job_folder(scale: Scale, job: Job) -> Path:
    """Where the checkpoints of a plateau are, or that of an arm which was stopped before its end."""
    return job.folder or scale.runs / result_file(scale, job).stem


def find_stopped(scale: Scale, job: Job) -> Path | None:
    """The checkpoint of an arm that was stopped before its end; None if there is none."""
    found = job_folder(scale, job).glob("step-*[0-9]") if job.arm else ()
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def plateau_jobs(scale: Scale, jobs: list[Job], budgets) -> list[Job]:
    """The jobs that make the checkpoints from which `jobs` start. They keep those of all `budgets` that they
    pass. Raises ValueError if a plateau was begun with other arguments."""
    schedules = [schedule(scale, arm, budget) for arm in ARMS.values() for budget in budgets]
    found = []
    for seed in sorted({job.seed for job in jobs}):
        for depth in (SMALL, LARGE):
            folder = plateau_folder(scale, depth, seed)
            arguments = new_arguments(scale, depth, seed, 1, 0.0)
            check_begun(folder, arguments)
            needed = {job.start for job in jobs if job.start and job.start.parent == folder}
            missing = sorted(step_of(checkpoint) for checkpoint in needed if not checkpoint.is_dir())
            if missing:
                saved = {step_of(checkpoint) for checkpoint in folder.glob("step-*[0-9]")}
                last = max((step for step in saved if step < missing[0]), default=0)
                start = folder / f"step-{last}" if last else None
                marks = tuple({each.mark for each in schedules if each.plateau == depth} - saved)
                rest = {"seed": seed, "folder": folder, "marks": marks}
                found.append(Job(arguments, start, missing[-1], math.inf, 0.0, **rest))
    return found


def check_begun(folder: Path, arguments):
    """Raise ValueError if a job was begun with other arguments; write them down if it is new."""
    file = folder / "arguments.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(arguments))
    elif json.loads(file.read_text()) != arguments:
        raise ValueError(f"{folder} was begun with other --clips, --batch or --rates: choose another --runs")


# --------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Stretch:
    """A job that is under way."""

    job: Job
    args: argparse.Namespace
    tr: Training
    step: int  # steps done
    curve: list[dict]  # of the validation loss
    one_step: Callable[[Batch], torch.Tensor]  # from train.make_step
    stream: torch.cuda.Stream | None


def first_checkpoint(scale: Scale, args) -> Checkpoint:
    """What a job continues from: a new model, a checkpoint of a plateau, or a model grown from one."""
    start = starting_point(args)
    if start is None:
        torch.manual_seed(args.seed)
        model = DiT(replace(new_config(args), text_dim=scale.prompts.features[0].dim))
        return Checkpoint(model, copy.deepcopy(model), {}, first_metadata(args), {})
    if args.resume:
        del start.metadata["history"][-1]  # it is this run
    return start


def new_stream(device) -> torch.cuda.Stream | None:
    """A stream that begins after what the device has been asked to do; None without CUDA."""
    if device.type != "cuda":
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream


def begin(scale: Scale, job: Job) -> Stretch:
    """Prepare a job, on a GPU in a stream of its own."""
    args = parse_arguments([*job.arguments, *(["--from", str(job.start)] if job.grows else [])])
    check_begun(job_folder(scale, job), [*job.base, *job.arguments])
    stopped = find_stopped(scale, job)
    if stopped or (job.start and not job.grows):
        args.resume, args.out = True, str(stopped or job.start)
    stream = new_stream(scale.device)
    with torch.cuda.stream(stream):
        start = first_checkpoint(scale, args)
        tr = build(args, start, scale.data, scale.prompts, scale.device)
        step, curve = tr.trainer_state["step"], tr.trainer_state.get("curve", [])
        stretch = Stretch(job, args, tr, step, curve, make_step(tr, args.accumulate), stream)
        if not curve or (job.arm and not stopped and curve[-1]["step"] < step):
            validate(scale, stretch)
    return stretch


def is_point(step: int, steps: float, decay: float) -> bool:
    """Whether the curve of a run of `steps` has a point at this step. On the plateau: at each up to 8, then
    at four in every doubling, whatever the budget. In the decay, where the loss falls fast: at DECAY_POINTS
    or a few more, the last step among them."""
    if step > (1 - decay) * steps:
        return (steps - step) % max(1, int(decay * steps) // DECAY_POINTS) == 0
    return step % 2 ** max(0, step.bit_length() - 3) == 0


def validate(scale: Scale, stretch: Stretch):
    """Append the validation loss of the EMA to the curve. Raises Diverged."""
    tr = stretch.tr
    losses = loss_by_timestep(tr.ema, scale.batches, tr.precision).tolist()
    loss = sum(losses) / T_BINS
    if not math.isfinite(loss):
        raise Diverged(stretch.step, loss)
    stretch.curve.append({"step": stretch.step, "flops": tr.flops_at(stretch.step), "val_loss": loss})


def advance(scale: Scale, stretch: Stretch):
    """One step of train.py's loop; then validation and checkpoint, if it is time."""
    args, tr, job, step = stretch.args, stretch.tr, stretch.job, stretch.step
    with torch.cuda.stream(stretch.stream):
        tr.lr.fill_(learning_rate(tr.peak, step, job.steps, args.warmup, job.decay, tr.lr_before))
        batch = random_batch(tr, args.seed, tr.steps_before + step, args.batch)
        stretch.one_step(batch)
        update_ema(tr.ema, tr.model, tr.steps_before + step, args.ema)
        stretch.step += 1
        if is_point(stretch.step, job.steps, job.decay):
            validate(scale, stretch)
        if stretch.step in job.marks:
            keep(scale, stretch)


def keep(scale: Scale, stretch: Stretch):
    """Write a checkpoint of a job."""
    checkpoint = snapshot(stretch.args, stretch.tr, stretch.step, seconds=0.0, curve=stretch.curve)
    save_checkpoint(job_folder(scale, stretch.job) / f"step-{stretch.step}", checkpoint)


def run_jobs(scale: Scale, jobs: list[Job], is_over: Callable[[], bool]) -> list[str]:
    """Train jobs, AT_ONCE at the same time -> the titles of those that diverged. When `is_over()` is true, or
    after an error, those that are under way are saved as they are. Raises ValueError if another process
    trains one of them."""
    waiting, running, diverged = list(jobs), [], []
    with contextlib.ExitStack() as locks, tqdm(unit="step") as bar:
        try:
            while (waiting or running) and not is_over():
                while waiting and len(running) < AT_ONCE.get(scale.device.type, 1):
                    job = waiting.pop(0)
                    locks.enter_context(lock(job_folder(scale, job), "choose other --seeds or --runs"))
                    running.append(begin(scale, job))
                bar.update(len(running))
                diverged += one_step_each(scale, running)
        except RuntimeError:
            if not is_over():  # Ctrl-C in a terminal also ends the compiler that a step waits for
                raise
        finally:
            for stretch in running:
                with torch.cuda.stream(stretch.stream):
                    keep(scale, stretch)
                title = stretch.job.title
                print(f"{title}: saved at step {stretch.step}; the same command continues", flush=True)
    return diverged


def one_step_each(scale: Scale, running: list[Stretch]) -> list[str]:
    """One step of each stretch of `running`. What has come to its end leaves the list -> the titles of those
    that diverged."""
    diverged = []
    for stretch in tuple(running):
        title = stretch.job.title
        try:
            advance(scale, stretch)
        except Diverged as error:
            print(f"{title}: {error}", flush=True)
            diverged.append(title)
            running.remove(stretch)
            continue
        if stretch.step < stretch.job.stop:
            continue
        running.remove(stretch)
        if stretch.job.arm:
            write_result(scale, stretch)
        else:
            print(f"{title}: {stretch.step} steps", flush=True)
    return diverged


def write_result(scale: Scale, stretch: Stretch):
    """The JSON file of an arm that has ended, in place of its checkpoints."""
    job, tr = stretch.job, stretch.tr
    config = tr.model.config
    before = tr.trainer_state["flops_before"]
    steps = tr.steps_before + stretch.step
    result = {
        "arm": job.arm,
        "budget": job.budget,
        "seed": job.seed,
        "arguments": job.arguments,
        "base": list(job.base),
        "revision": scale.revision,
        "machine": scale.machine,
        "parameters": sum(p.numel() for p in tr.model.parameters()),
        "tokens": steps * stretch.args.batch * config.tokens(),
        "flops": tr.flops_at(stretch.step),
        "base_flops": before,
        "curve": stretch.curve,
    }
    file = result_file(scale, job)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(result))
    shutil.rmtree(job_folder(scale, job))
    print(f"{job.title}: {stretch.step} steps, loss {stretch.curve[-1]['val_loss']:.4f}", flush=True)


def run_budgets(scale: Scale, budgets, arms, seeds, is_over):
    """Train what is not there yet: for each budget the plateaus as far as `arms` need them, then `arms`.
    Raises ValueError if one diverges, when the others have come to their end."""
    for budget in sorted(budgets):
        jobs = [arm_job(scale, name, budget, seed) for name in arms for seed in seeds]
        jobs = [job for job in jobs if not is_done(scale, job)]
        for stage in (plateau_jobs(scale, jobs, budgets), jobs):
            if diverged := run_jobs(scale, stage, is_over):
                names = "; ".join(diverged)
                raise ValueError(f"{names}: lower --rates, with another --out and another --runs")
            if is_over():
                return  # a plateau may not be there yet


def tune(scale: Scale, budget, seed, is_over):
    """Train each size from scratch with other learning rates; the results go into a folder of their own. A
    rate with which a size diverges has none."""
    scale = replace(scale, results=scale.results / "rates")
    jobs = []
    for depth, rate in scale.rates.items():
        for factor in TUNED:
            other = replace(scale, rates={depth: factor * rate})
            _, _, steps, decay = schedule(scale, Arm(depth), budget)
            arguments = new_arguments(other, depth, seed, steps, decay)
            name = f"{depth} blocks, rate {factor * rate:g}"
            jobs.append(Job(arguments, None, steps, steps, decay, name, budget, seed))
    jobs = [job for job in jobs if not is_done(scale, job)]
    run_jobs(scale, jobs, is_over)


# --------------------------------------------------------------------------------------------------------
# The command


def make_parser():
    """The options of the command."""
    parser = argparse.ArgumentParser(
        description="Train grown and other models with several budgets; a JSON file per budget, arm and seed."
    )
    add = parser.add_argument
    budgets = f"times {BUDGET:g} FLOPs (1 4 16 64)"
    add("--budgets", nargs="+", type=float, default=[1, 4, 16, 64], help=budgets)
    names = "; ".join(ARMS).replace("%", "%%")
    add("--arms", nargs="*", metavar="ARM", choices=ARMS, default=list(ARMS), help=f"of: {names} (all)")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    add("--out", help="folder for the JSON files (results/scale, or runs/scale-quick)")
    add("--runs", help="folder for checkpoints (runs/scale, or runs/scale-quick)")
    add("--clips", type=int, help="to train on; all calls need as many (a tenth of what --budgets show)")
    add("--batch", type=int, default=16, help="clips per step (16)")
    blocks = f"of {SMALL}, {MIDDLE} and {LARGE} blocks"
    add("--rates", nargs=3, type=float, default=list(RATES.values()), help=f"learning rates {blocks}")
    add("--minutes", type=float, default=math.inf, help="stop then; call again to continue (off)")
    tune = "first compare learning rates: smallest budget, first seed; with a bare --arms nothing else (off)"
    add("--tune", action="store_true", help=tune)
    add("--quick", action="store_true", help="tiny sizes: see that everything works, learn nothing (off)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    return parser


def main(argv=None):
    """Train what is not there yet: `python -m lab.scale`."""
    deadline = time.monotonic()
    args = make_parser().parse_args(argv)
    for name in ("budgets", "rates", "clips", "batch", "minutes"):
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and not value > 0:
                raise ValueError(f"--{name} is {value:g}; it must be more than zero")
    deadline += 60 * args.minutes
    scale = open_scale(args)
    signals = Signals()

    def is_over():
        return signals.asked or time.monotonic() >= deadline

    signals.listen()
    try:
        if args.tune:
            tune(scale, min(args.budgets), args.seeds[0], is_over)
        run_budgets(scale, args.budgets, args.arms, args.seeds, is_over)
    finally:
        signals.restore()


if __name__ == "__main__":
    run_command(main, "lower --clips or --batch")
