"""The training loop, for new models and for further training of a checkpoint.

**The loop.** Rectified flow (flow.py) with AdamW; a learning-rate schedule of warmup, stable and decay (a
plateau can be continued or grown from, a cosine cannot); gradients clipped to norm 1; an exponential moving
average (EMA) of the weights, which is sampled, evaluated and grown; products in bfloat16 where that is fast.

**Captions are dropped.** One in ten is replaced by the null prompt, which classifier-free guidance needs.
With an LLM branch, half of the captions are also hidden from the small text encoder (--drop-text). Otherwise
the new branch gets almost no gradient and its gate stays closed.

**Randomness by number.** The rows, timesteps, noise and dropped captions of a step are functions of (seed,
step) and the type of the device. Rows are drawn on the CPU, all else on the training device. A resumed run
draws what it would have drawn.

**Nothing waits for the CPU.** Clips (bytes) and caption features lie on the training device if they fit. The
loop looks at a loss every tenth step only. On a GPU the step is captured as a CUDA graph (machine.py).

**Continuing from a run** (`--from`, and `--grow` first, see grow.py) takes weights, EMA and optimizer state
along and counts its steps (start.py). The learning rate starts where that run ended: one that had decayed is
warmed up again, one on its plateau continues.

Differences from big trainers: no configuration files, no logger but a file of JSON lines (run.py).
"""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

import torch

import parallel
from attention import BACKENDS
from clips import MAX_BAD, VALIDATION
from data import SETS
from dit import PRESETS
from flow import flow_loss, logit_normal, shift_of
from grow import WHERE, ZEROS
from machine import PRECISIONS, GraphedStep, autocast, run_command, to_device
from run import LOG_EVERY, PRETRAINED, Diverged, Run, find_checkpoint, option_name, read_options, runs_folder
from start import TEXT_DROPOUT, Training, check_data_options, check_numbers, find_data, set_up
from text_encoder import LLM_LAYERS, Prompts
from validate import compare_with_base, save, say_what_to_expect, validate_and_save

CFG_DROPOUT = 0.1  # share of captions replaced by the null prompt, for classifier-free guidance
CLIP_NORM = 1.0  # largest norm of the gradient
TIMED_STEPS = 3 * LOG_EVERY  # after which --minutes fixes the number of steps
MEMORY_HINT = "lower --batch or --size, raise --accumulate, or give --checkpoint-activations"

# --------------------------------------------------------------------------------------------------------
# The command line


def make_parser() -> argparse.ArgumentParser:
    """All options, with defaults that make the recommended run. None: it depends on others, see the help."""
    parser = argparse.ArgumentParser(
        description="Train a text-to-video model on the toy world or on your clips, or grow a trained one."
    )
    add = parser.add_argument_group("what to train").add_argument
    add("--preset", default="tiny", choices=PRESETS, help="size of a new model, see `python cost.py` (tiny)")
    add("--frames", type=int, help="frames of a clip (as the preset or the base)")
    add("--size", type=int, help="pixels per side of a clip (as the preset or the base)")
    add("--depth", type=int, help="blocks of a new model (as the preset)")
    add("--data", help="basic, rich or both of the toy world, or a folder of clips (basic; rich with --from)")
    add("--captions", choices=("short", "detailed", "both"), help="(basic: short, both: both, else detailed)")
    add("--fps", type=float, help="frames per second at which a folder's videos are read (as the base, or 8)")
    add("--max-bad", type=float, default=MAX_BAD, help="share of a folder's files that may be bad (0.1)")
    add("--validation", type=float, default=VALIDATION, help="share of a folder's files to hold out (0.1)")
    add("--words", default="train", choices=("train", "varied"), help="two words per thing, or five (train)")
    add("--clips", type=int, help="clips in the training set (16384 of basic; 4096 of rich and both; all)")
    add("--text", help="text encoder: minilm, a directory or a Hub id (as the base, or minilm)")
    add = parser.add_argument_group("continuing from a run, the base").add_argument
    add(
        "--from",
        dest="base",
        help="run or checkpoint (with --grow: runs/base, else pretrained; without: none)",
    )
    add("--grow", metavar="HOW", help="depth (zero-initialized copies), width, mlp, llm; or depth,llm (off)")
    add("--add", type=int, help="with --grow depth: blocks to add (as many as there are)")
    add("--where", default="insert", choices=WHERE, help="with --grow depth: where the copies go (insert)")
    add("--zero", default="gate", choices=ZEROS, help="with --grow depth: what is zero in the copies (gate)")
    add("--llm", default="smollm2", help="with --grow llm: smollm2, a directory or a Hub id (smollm2)")
    add("--llm-features", default="last", choices=LLM_LAYERS, help="with --grow llm: which layers (last)")
    add("--drop-text", type=float, default=TEXT_DROPOUT, help="share of captions only an LLM reads (0.5)")
    add("--tune", choices=("all", "new", "lora"), help="all, what is new, or adapters (all, or lora)")
    add("--rank", type=int, help="of the adapters of --tune lora (8, or as the base)")
    add = parser.add_argument_group("how long and how").add_argument
    add("--steps", type=int, help="optimizer steps (6000; 1200 with --from)")
    add("--minutes", type=float, help="as many steps as fit, judged by the speed of the first ones (off)")
    add("--batch", type=int, help="clips per step (32; on a GPU as many of these as fit, 16 for base)")
    add("--lr", type=float, help="peak learning rate (as the base, or 3e-3 at width 128, less when wider)")
    add("--warmup", type=int, default=100, help="steps from zero, or the base's last rate, to the peak (100)")
    add("--decay", type=float, default=0.3, help="last share of the run, in which the rate falls to 0 (0.3)")
    add("--ema", type=float, default=0.998, help="decay of the averaged weights (0.998)")
    add("--seed", type=int, default=0, help="of weights, batches and noise (0)")
    add("--every", type=int, default=1500, help="steps between samples, validation and checkpoint (1500)")
    add("--keep", action="store_true", help="keep the weights of every validation, in step_N (off)")
    add("--quick", action="store_true", help="20 steps, in runs/quick: see that everything works (off)")
    add = parser.add_argument_group("run and machine").add_argument
    add("--out", help="run directory (runs/base; runs/BASE-depth, -width, -lora, -more with --from)")
    add("--resume", action="store_true", help="continue the run in --out, with its options but --shard (off)")
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, mps, ... (auto)")
    add("--precision", default="auto", choices=("auto", *PRECISIONS), help="(auto: bf16 where it is fast)")
    add("--attention", default="auto", choices=BACKENDS, help="backend of attention.py (auto)")
    add("--accumulate", type=int, default=1, help="parts that a batch is cut into, to save memory (1)")
    add("--checkpoint-activations", action="store_true", help="save memory, compute a third more (off)")
    add("--shard", action="store_true", help="with torchrun: shard parameters and optimizer state (off)")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (on, where it works)")
    return parser


QUICK = {"preset": "nano", "batch": 8, "every": 10, "compile": False}  # other defaults
RESUMABLE = (  # what may change when a run is resumed
    "steps", "minutes", "every", "keep", "max_bad", "device", "precision", "attention", "compile",
    "accumulate", "checkpoint_activations", "shard", "resume", "out",
)  # fmt: skip


def parse_arguments(argv=None) -> argparse.Namespace:
    """The command line -> options with their defaults. Raises ValueError with a one-line message for what
    makes no sense."""
    parser = make_parser()

    def fail(message):
        raise ValueError(f"{message}; see `python train.py --help`")

    parser.error = fail  # argparse would print the usage, and end the process
    given = parser.parse_args(argv)
    if given.quick:
        parser.set_defaults(**QUICK)
        given = parser.parse_args(argv)
    defaults = parser.parse_args([])
    if given.grow and not given.base:
        given.base = default_base(given.quick)
    given.out = given.out or default_folder(given)
    if given.resume:
        return resumed_arguments(parser, argv, given.out)
    check_growth(given, defaults)
    fill_defaults(given, defaults)
    check_numbers(given)
    return given


def default_base(quick: bool) -> str:
    """What --grow grows if no base is named: the run called base if it is there, else the included model."""
    base = f"{runs_folder(quick)}/base"
    try:
        find_checkpoint(base)
    except FileNotFoundError:
        return str(PRETRAINED)
    return base


def default_folder(args) -> str:
    """The folder of a run that has no --out."""
    root = runs_folder(args.quick)
    if not args.base:
        return f"{root}/base"
    name = [part for part in Path(args.base).absolute().parts if part != "checkpoint"][-1]
    suffix = "lora" if args.tune == "lora" else "more"
    if args.grow:
        suffix = args.grow.replace(",", "-")
    return f"{root}/{name}-{suffix}"


def resumed_arguments(parser, argv, out: str) -> argparse.Namespace:
    """The options that a run was begun with, with those of RESUMABLE as they are given now."""
    before = read_options(out, parser) | {"out": out, "resume": True, "shard": False}
    args = parser.parse_args(argv, argparse.Namespace(**before))
    args.out = out
    for name, value in before.items():
        if getattr(args, name) != value and name not in RESUMABLE:
            option = option_name(name)
            raise ValueError(f"--resume continues with the options that the run had: leave out {option}")
    longer = args.steps != before.get("steps")
    if longer and args.minutes != before.get("minutes"):
        raise ValueError("--steps and --minutes both say how long to train: leave out one")
    if longer:
        args.minutes = None  # the newer wish counts
    elif args.minutes != before.get("minutes"):
        args.steps = None
    check_numbers(args)
    return args


def check_growth(args, defaults):
    """Raise ValueError for an unknown growth, and for options that go with another one."""
    operators = args.grow.split(",") if args.grow else []
    for operator in operators:
        if operator not in ("depth", "width", "mlp", "llm"):
            raise ValueError(f"no growth is called {operator!r}; there are depth, width, mlp and llm")
    for operator, options in (("depth", ("add", "where", "zero")), ("llm", ("llm", "llm_features"))):
        for option in options:
            if getattr(args, option) != getattr(defaults, option) and operator not in operators:
                name = option.replace("_", "-")
                raise ValueError(f"--{name} is for --grow {operator}, which is not given")
    if args.depth and args.base:
        raise ValueError("--depth is for a new model; --grow depth adds blocks to a trained one")
    if args.preset != defaults.preset and args.base:
        raise ValueError("--preset is for a new model; one that continues has the size of its base")
    if args.tune == "lora" and not args.base:
        raise ValueError("--tune lora needs a base: give --from RUN")
    if args.rank and args.tune != "lora":
        raise ValueError("--rank is for --tune lora, which is not given")
    if args.steps and args.minutes:
        raise ValueError("--steps and --minutes both say how long to train: leave out one")


def fill_defaults(args, defaults):
    """Fill in the options that depend on others. What depends on the base or the device stays None here:
    start.py fills it in."""
    args.data = find_data(args.data) if args.data else ("rich" if args.base else "basic")
    toy = args.data in SETS
    check_data_options(args, defaults)
    args.captions = args.captions or {"basic": "short", "both": "both"}.get(args.data, "detailed")
    if args.clips is None and toy:
        args.clips = 256 if args.quick else {"basic": 16384}.get(args.data, 4096)
    if args.steps is None and args.minutes is None:
        args.steps = 20 if args.quick else 1200 if args.base else 6000
    if args.compile is None:
        args.compile = True


# --------------------------------------------------------------------------------------------------------
# One step


class Batch(NamedTuple):
    """What a step learns from, on the training device."""

    x: torch.Tensor  # (B, 3, T, H, W) uint8
    t: torch.Tensor  # (B,) in (0, 1)
    noise: torch.Tensor  # (B, 3, T, H, W)
    text_rows: torch.Tensor  # (B,) captions for the small encoder, as row numbers of the prompts
    llm_rows: torch.Tensor  # (B,) captions for the LLM

    def split(self, parts: int) -> list["Batch"]:
        """The batch in at most `parts` parts."""
        chunks = [tensor.chunk(parts) for tensor in self]
        return [Batch(*part) for part in zip(*chunks, strict=True)]


def generator_of(seed: int, step: int, device) -> torch.Generator:
    """The random numbers of a step."""
    return torch.Generator(device).manual_seed((seed * 1_000_000_007 + step) % 2**63)


def random_rows(seed: int, step: int, batch: int, count: int) -> torch.Tensor:
    """Which of `count` clips are in a step -> (B,) on the CPU, where clips may have to be read."""
    return torch.randint(count, (batch,), generator=generator_of(seed + 1_000_003, step, "cpu"))


def random_batch(tr: Training, seed: int, step: int, batch: int) -> Batch:
    """All that is random in a step, as a function of (seed, step), for a batch of B clips."""
    count = len(tr.captions)
    rows, ahead = (random_rows(seed, s, batch, count) for s in (step, step + 1))
    x = tr.clips.take(rows, ahead)
    g = generator_of(seed, step, tr.device)
    t = logit_normal(torch.randn(batch, generator=g, device=tr.device), shift_of(x.shape))
    noise = torch.randn(x.shape, generator=g, device=tr.device)
    drop = torch.rand(batch, generator=g, device=tr.device)
    captions = tr.captions[to_device(rows, tr.device)]
    null = tr.prompts.null
    llm_rows = captions.masked_fill(drop < CFG_DROPOUT, null)  # both encoders lose these
    text_rows = captions.masked_fill(drop < CFG_DROPOUT + tr.text_dropout, null)  # the small one some more
    return Batch(*map(parallel.my_share, (x, t, noise, text_rows, llm_rows)))


def prompt_lengths(tr: Training, batch: Batch) -> list[int]:
    """The length to which the prompts are padded, for each encoder. On a GPU it is that of the longest of
    all, so that nothing is waited for. On a CPU it is that of the longest in the batch, rounded up to a
    quarter of the longest of all, so that little is padded and little compiled."""
    if tr.device.type != "cpu":
        return tr.prompts.lengths
    lengths = []
    for features, rows in zip(tr.prompts.features, (batch.text_rows, batch.llm_rows), strict=False):
        quarter = math.ceil(features.max_length / 4)
        longest = int(features.lengths[rows].max())
        lengths.append(min(math.ceil(longest / quarter) * quarter, features.max_length))
    return lengths


def training_step(tr: Training, batch: Batch, accumulate: int = 1) -> torch.Tensor:
    """One step of the optimizer on this process's share of a batch, in `accumulate` parts -> the mean loss, a
    0-dim tensor; nan if the gradient is not finite."""
    total = torch.zeros((), device=tr.device)
    parts = batch.split(accumulate)
    for i, part in enumerate(parts):
        x = part.x.float() / 127.5 - 1  # bytes -> [-1, 1]
        prompt = tr.prompts.gather(part.text_rows, part.llm_rows, prompt_lengths(tr, part))
        tr.network.require_backward_grad_sync = i == len(parts) - 1  # processes average the sum of all parts
        with autocast(tr.device, tr.precision):
            loss = flow_loss(tr.network, x, part.t, part.noise, prompt).sum() / len(batch.t)
        tr.scaler.scale(loss).backward()
        total += loss.detach()
    tr.scaler.unscale_(tr.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(tr.model.parameters(), CLIP_NORM)
    tr.scaler.step(tr.optimizer)
    tr.scaler.update()
    tr.optimizer.zero_grad()
    if tr.scaler.is_enabled():  # it skips steps whose gradient overflows, and lowers its scale
        return total
    return torch.where(parallel.whole(norm).isfinite(), total, torch.nan)


def make_step(tr: Training, accumulate: int):
    """`training_step` as a function of a batch. On one GPU its kernels are captured as a CUDA graph, but not
    with --accumulate, with --checkpoint-activations, with features that stay on the CPU, or in float16, whose
    scaler looks at the gradient."""
    plain = accumulate == 1 and not tr.model.checkpoint_activations and not tr.scaler.is_enabled()
    if tr.device.type == "cuda" and plain and tr.prompts.resident and parallel.WORLD == 1:
        captured = GraphedStep(lambda *tensors: training_step(tr, Batch(*tensors)))
        return lambda batch: captured(*batch)
    return lambda batch: training_step(tr, batch, accumulate)


@torch.no_grad()
def update_ema(ema, model, step: int, decay: float):
    """ema += (1 - d) (model - ema). d rises to `decay` as (1 + step) / (10 + step), so that the first weights
    are soon forgotten (the rule of TensorFlow's ExponentialMovingAverage with `num_updates`)."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)


def learning_rate(peak, step, steps, warmup, decay=0.3, start=0.0) -> float:
    """Warmup-stable-decay: from `start` up to the peak over `warmup` steps, a plateau, and a straight line to
    zero over the last `decay` of `steps`, which may be infinite."""
    start = min(start, peak)
    rate = start + (peak - start) * min(1.0, (step + 1) / warmup)
    if decay and steps < math.inf:
        rate *= min(1.0, (1 - step / steps) / decay)
    return rate


# --------------------------------------------------------------------------------------------------------
# The loop


def steps_within(args, run: Run) -> int:
    """How many steps fit into --minutes, by the speed of the last steps and the time of a validation."""
    per_step = args.batch / run.records[-1]["samples_per_second"] + run.pause_seconds / args.every
    left = 60 * args.minutes - run.seconds() - run.pause_seconds
    return run.step + max(0, int(left / per_step))


def train(args, prompts_class=Prompts) -> Path:
    """Train as `parse_arguments` says -> the run's directory. `prompts_class` makes features of prompts (the
    study has controls). Raises ValueError or OSError with a one-line message for user errors."""
    parallel.start(args.batch, args.device)
    with Run(args.out, args.resume, parallel.RANK == 0, parallel.agree, parallel.mean) as run:
        tr = set_up(args, prompts_class)
        run.begin(vars(args), tr.trainer_state)
        if not args.resume:
            compare_with_base(args, tr, run)
            say_what_to_expect(args)
        one_step = make_step(tr, args.accumulate)
        try:
            for step in run.steps():
                if step % args.every == 0 and not run.validated():
                    validate_and_save(args, tr, run)
                rate = learning_rate(tr.peak, step, run.total, args.warmup, args.decay, tr.lr_before)
                tr.lr.fill_(rate)
                batch = random_batch(tr, args.seed, tr.steps_before + step, args.batch)
                try:
                    loss = one_step(batch)
                except RuntimeError:
                    if parallel.WORLD > 1 or not run.signals.asked:
                        raise
                    run.stopped = True  # Ctrl-C in a terminal also ends the compiler that a step waits for
                    break
                update_ema(tr.ema, tr.model, tr.steps_before + step, args.ema)
                run.log(loss, args.batch, lr=rate, flops=tr.flops_at(step + 1))
                timed = run.step >= run.first + TIMED_STEPS and run.step % LOG_EVERY == 0
                if timed and run.total == math.inf:
                    run.total = int(parallel.agree(steps_within(args, run)))
            if run.stopped:
                save(args, tr, run)
            elif not run.validated():
                validate_and_save(args, tr, run)
        except Diverged as error:
            raise ValueError(f"{error}: {diverged_hint(args, tr, error.step)}") from None
    if parallel.RANK == 0:
        print(run.summary())
    parallel.finish()
    return run.folder


def diverged_hint(args, tr: Training, step: int) -> str:
    """What to do after a step whose loss is not finite, and which clips were in it."""
    rows = random_rows(args.seed, tr.steps_before + step, args.batch, len(tr.data.clips))
    names = "; ".join(tr.data.clips.names[row] for row in rows.tolist())
    return f"the last checkpoint is kept; a new run, or one --from it, needs a lower --lr ({names})"


def main():
    """`python train.py`."""
    try:
        train(parse_arguments())
    except RuntimeError as error:
        if not parallel.peer_lost(error):
            raise
        message = f"process {parallel.RANK}: another process of this run ended; use --resume"
        raise ValueError(message) from None


if __name__ == "__main__":
    run_command(main, MEMORY_HINT)
