"""The study: what the paper claims, tested at a scale that a laptop can afford.

ModelGrow (arXiv 2412.18966) compares a base model, LoRA, a model with twice the blocks, and that one with a
language model. Four parts, and in each a base per seed, from which its arms go on:

**language** - does a language model help? Every arm goes on for as many steps on the same clips and captions
in the same order, with or without a branch that reads the hidden states of an LLM; half of the captions is
then hidden from the small encoder (train.py). The base has learned for twice as long; after shorter ones
hiding captions cost more than the LLM gave. Two controls: the LLM reads the caption of another clip (what is
gained then is parameters); the new branch reads MiniLM once more (what is gained then is a branch).

**growth** - is it better to grow? The base has learned `basic`, one actor and short captions; the arms go on
with `rich`, several actors and long captions. All may spend the same number of FLOPs, those of the base
included, so that an arm with half the blocks makes twice the steps; the tables also compare at equal steps.
*large from scratch* spends everything on `rich`.

**timing** - when to grow, and does it save anything? Small models learn `rich` for a share of that budget and
are then grown to the size of *large from scratch*; how soon do they reach its final loss?

**longer** - with four times that budget, when the small model has come nearer to its limit, is it better to
grow it than to go on?

**FLOPs** are counted by torch for a step forward and backward (`dit.count_flops`), without the frozen text
encoders, whose features are computed once. Learning rates stay on their plateau and the averaged weights
(EMA) are judged, over about a hundred steps: a run can then be compared at any step of it. (In part language,
where only ends are compared, rates decay.)

**What is measured.** The reader (reader.py, evaluate.py) scores clips for prompts never seen; losses are
those on held-out clips with fixed noise. Scoring six sets of 200 prompts takes nearly as many FLOPs as to
train an arm of part growth, so that part makes do with 100. Six steps of the solver do, as more do not change
the scores (README, *Speed*). Differences are taken within a seed. The spread is over seeds, which decide
weights, batches and noise; clips, captions and test prompts are the same for all.

**What is kept.** One JSON per arm and seed in results/PART/: arguments, revision of the code, machine, curve
of the loss, scores. Finished ones are skipped, a run that was killed goes on from its checkpoint, and
`--report` makes tables, plots and verdicts from the JSON alone (report.py), also those in README.md.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from checkpoint import load_model
from draw import save_grid
from evaluate import evaluate, prove, table
from reader import Reader, get_reader
from report import TIMED, write_report
from sample import solve, to_uint8
from text_encoder import NULL_PROMPT, Prompts
from train import parse_arguments, train

# Each part: {arm: (the arm it goes on from, what train.py is told)}. An arm that is there for others to go on
# from, and for nothing else, begins with an underscore and is not scored.
VARIED = "--data basic --words varied --clips 8192 --batch 16 --every 2000 "
MORE = VARIED + "--steps 4000 "
LLM = MORE + "--drop-text 0.5 --grow llm --llm-features "
SHARED = MORE + "--drop-text 0 --grow llm --llm-features mean"  # the small encoder reads all captions too
LANGUAGE = {
    "base": (None, VARIED + "--preset nano --steps 8000 --decay 0"),
    "base encoder": ("base", MORE),
    "llm last": ("base", LLM + "last"),
    "llm middle": ("base", LLM + "middle"),
    "llm mean": ("base", LLM + "mean"),
    "llm last, refiner": ("base", LLM + "last --refiner 2"),
    "llm middle, refiner": ("base", LLM + "middle --refiner 2"),
    "llm mean, refiner": ("base", LLM + "mean --refiner 2"),
    "llm mean, nothing hidden": ("base", SHARED),
    "wrong captions, nothing hidden": ("base", SHARED),
    "minilm twice": ("base", LLM + "mean"),
}
TOLD_BY = ("seen", "held-out words", "held-out forms", "long")
BUDGET = 2.4e13  # FLOPs: 1,400 steps of *large from scratch*
PLATEAU = "--decay 0 --ema 0.99 --batch 16 --every 200 "
NEW = PLATEAU + "--preset nano "
SPEND = "--data rich --clips 8192 --flops "
RICH = f"{SPEND}{BUDGET:g} "
GROWN = PLATEAU + RICH
DEPTH = GROWN + "--grow depth "
GROWTH = {
    "base": (None, f"{NEW}--data basic --flops {BUDGET / 2:g}"),
    "_untrained": (None, f"{NEW}--data basic --steps 1"),
    "continued": ("base", GROWN),
    "lora": ("base", GROWN + "--tune lora"),
    "insert": ("base", DEPTH),
    "prefix": ("base", DEPTH + "--where prefix"),
    "suffix": ("base", DEPTH + "--where suffix"),
    "insert, plain copies": ("base", DEPTH + "--zero none"),
    "insert, old blocks frozen": ("base", DEPTH + "--tune new"),
    "insert, double zero": ("base", DEPTH + "--zero both"),
    "width x 2": ("base", GROWN + "--grow width"),
    "insert, short captions": ("base", DEPTH + "--captions short"),
    "insert + llm": ("base", GROWN + "--grow depth,llm"),
    "insert + llm, short captions": ("base", GROWN + "--grow depth,llm --captions short"),
    "insert into an untrained base": ("_untrained", DEPTH),
    "large from scratch": (None, f"{NEW}{RICH}--depth 8"),
}
SHARES = (5, 10, 25, 50, 80)  # % of the budget spent before growth
TIMING = {}
for before, share in zip((None, *SHARES), SHARES, strict=False):
    told = f"{SPEND}{BUDGET * share / 100:g}"
    start = f"_small {before} %" if before else None
    TIMING[f"_small {share} %"] = (start, (PLATEAU if before else NEW) + told)
    TIMING[f"insert at {share} %"] = (f"_small {share} %", DEPTH)
TIMING["never grown"] = ("_small 80 %", GROWN)
TIMING["_smaller 25 %"] = (None, f"{NEW}--depth 2 {SPEND}{BUDGET / 4:g}")
TIMING["insert at 25 %, x 4"] = ("_smaller 25 %", DEPTH + "--add 6")
FAR = f"--every 800 {SPEND}{4 * BUDGET:g}"
LONGER = {
    "_small 50 %": (None, f"{NEW}--every 800 {SPEND}{2 * BUDGET:g}"),
    "insert at 50 %": ("_small 50 %", f"{PLATEAU}{FAR} --grow depth"),
    "never grown": ("_small 50 %", PLATEAU + FAR),
}
GALLERY = ("base", "lora", "insert", "insert + llm")
SHOWN = (
    "an orange cat surfing in the snow",
    "a yellow bird spinning left of a red car moving up at night",
    "three blue fish moving left in the desert",
    "a purple ball bouncing above a green dog that turns red in a meadow",
)
PARTS = {"language": LANGUAGE, "growth": GROWTH, "timing": TIMING, "longer": LONGER}


class WrongPrompts(Prompts):
    """The control of the content: the LLM reads the next caption of the batch; the null prompt stays."""

    def batch(self, *texts, few=False):
        """As `Prompts.batch`."""
        real = [text for text in texts[-1] if text != NULL_PROMPT]
        others = iter(real[1:] + real[:1])
        wrong = [text if text == NULL_PROMPT else next(others) for text in texts[-1]]
        return super().batch(texts[0], wrong, few=few)


class SamePrompts(Prompts):
    """The control of the branch: in the LLM's place the base's encoder once more, filled up with zeros."""

    def __init__(self, texts, header, llm_dim):
        super().__init__(texts, header, 0)
        self.llm_dim = llm_dim
        self.streams *= 2 if llm_dim else 1

    def batch(self, *texts, few=False):
        """As `Prompts.batch`."""
        text, mask, *again = super().batch(*texts, few=few)
        return (
            (text, mask, F.pad(again[0], (0, self.llm_dim - text.shape[-1])), again[1])
            if again
            else (text, mask)
        )


READ = {"wrong captions, nothing hidden": WrongPrompts, "minilm twice": SamePrompts}


def machine() -> str:
    """What the numbers were measured on, in words."""
    cpu = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).is_file():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        cpu = names[0] if names else cpu
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def find_revision() -> str:
    """The commit that this code is at, with a + if some of it differs; "unknown" outside of git."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", "--", "*.py"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changes.strip() else "")


REVISION = find_revision()  # of the code that runs, whatever is committed while it does


def place(root: Path, part, arm, seed) -> Path:
    """Where the run of an arm is, or its result: without spaces, commas and the like."""
    return root / part / f"{'-'.join(re.findall(r'[^ ,+%]+', arm))}-{seed}"


def arguments(part, arm, seed, quick) -> list[str]:
    """What train.py is told, but for the folders."""
    base, told = PARTS[part][arm]
    if quick:
        told = re.sub(r"--(flops|steps|every|clips) \S+", "", told) + " --quick --clips 16 --steps 2"
        told += "" if base else " --frames 4 --size 16"
    return [*told.split(), "--seed", str(seed)]


def train_arm(part, arm, seed, runs: Path, quick=False) -> Path:
    """Train an arm, after what it goes on from, or what is left of it -> its run. Raises ValueError if what
    is there was begun with other arguments."""
    run, read, base = place(runs, part, arm, seed), READ.get(arm, Prompts), PARTS[part][arm][0]
    how, out = arguments(part, arm, seed, quick), ["--out", str(run)]
    if base:
        how += ["--from", str(place(runs, part, base, seed))]
    if any((run / name).is_dir() for name in ("checkpoint", "checkpoint.old")):
        asked, told = vars(parse_arguments([*how, *out])), json.loads((run / "args.json").read_text())
        asked |= {"resume": told["resume"], "steps": told["steps"] if asked["flops"] else asked["steps"]}
        if other := [key for key, value in asked.items() if value not in (None, told.get(key))]:
            raise ValueError(f"{run} was begun with another --{other[0]}: delete it, or name another --runs")
        state = run / "checkpoint" / "train_state.json"
        if state.is_file() and json.loads(state.read_text())["step"] >= told["steps"]:
            return run
        how = ["--resume"]
    elif base:
        train_arm(part, base, seed, runs, quick)
    print(f"{part}: {arm}, seed {seed}: python train.py {' '.join([*how, *out])}")
    torch.compiler.reset()  # the graphs of another run do not fit
    return train(parse_arguments([*how, *out]), read=read)


def run_arm(part, arm, seed, runs: Path, results: Path, reader, quick=False):
    """Train and score an arm, unless its result is there -> what is written to results/PART/ARM-SEED.json.
    Raises ValueError if what is there was made with other arguments."""
    file = place(results, part, arm, seed)
    file, how = file.with_name(file.name + ".json"), arguments(part, arm, seed, quick)
    if file.is_file():
        if (result := json.loads(file.read_text()))["arguments"] != how:
            raise ValueError(f"{file} was made with other arguments: delete it, or name another --results")
        return result
    run = train_arm(part, arm, seed, runs, quick)
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {"arm": arm, "seed": seed, "arguments": how, "revision": REVISION, "machine": machine()}
    result["flops"] = load_model(run)[1]["flops"]
    if part not in TIMED and arm[0] != "_":
        count, steps = (2, 1) if quick else (100 if part == "growth" else 200, 6)
        read, only = READ.get(arm, Prompts), TOLD_BY if part == "language" else ()
        result["scores"] = evaluate(run, reader, count, steps, seed=seed, read=read, only=only)
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".tmp")
    whole.write_text(json.dumps(result | {"curve": curve}))
    whole.replace(file)
    return result


def write_gallery(runs: Path, seed, path: Path):
    """Side by side, as on the paper's page: clips by the base, LoRA, expansion and expansion with LLM, from
    the same noise."""
    shown = []
    for arm in GALLERY:
        model, header = load_model(place(runs, "growth", arm, seed))
        prompts = Prompts(SHOWN, header, model.config.llm_dim)
        shape = (len(SHOWN), 3, model.config.frames, model.config.size, model.config.size)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        clips = to_uint8(solve(model, noise, prompts.batch(SHOWN), prompts.batch([NULL_PROMPT])))
        shown.append(clips)
    labels = [f"{arm}: {prompt}" for prompt in SHOWN for arm in GALLERY]
    save_grid(path, np.stack(shown, 1).reshape(-1, *shown[0].shape[1:]), labels, columns=len(GALLERY))


def main(argv=None):
    """Run what is not there yet, then report: `python study.py`."""
    parser = argparse.ArgumentParser(
        description="Test the paper's claims at toy scale; writes one JSON per arm and seed, and a report."
    )
    parts = "; ".join(f"{part} ({', '.join(arm for arm in PARTS[part])})" for part in PARTS)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="questions (all)")
    add("--arms", nargs="+", metavar="ARM", help=f"of: {parts} (all)".replace("%", "%%"))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    add("--runs", help="folder for the runs (runs/study, or runs/study-quick)")
    add("--results", help="folder for the JSON and the report (results, or runs/study-quick)")
    add("--quick", action="store_true", help="all arms in a minute or two; nothing learned")
    add("--report", action="store_true", help="train nothing, report what is there")
    args = parser.parse_args(argv)
    known = {arm for part in args.parts for arm in PARTS[part]}
    if unknown := [arm for arm in args.arms or () if arm not in known]:
        raise ValueError(f"no arm is called {unknown[0]!r}; see `python study.py --help`")
    quick = "runs/study-quick" if args.quick else None
    runs, results = Path(args.runs or quick or "runs/study"), Path(args.results or quick or "results")
    if not args.report:
        reader = Reader().eval() if args.quick else get_reader()
        if not args.quick:
            print(table(proof := prove(reader)))
            results.mkdir(parents=True, exist_ok=True)
            (results / "reader.json").write_text(json.dumps(proof, indent=1))
        for part in args.parts:
            for seed in args.seeds[:1] if args.quick else args.seeds:
                for arm in PARTS[part]:
                    if arm in (args.arms or known):
                        run_arm(part, arm, seed, runs, results, reader, args.quick)
        names = [place(Path("growth"), "", arm, args.seeds[0]) for arm in GALLERY]
        done = (results.joinpath(f"{name}.json").is_file() for name in names)
        if all(done) and all((runs / name / "checkpoint").is_dir() for name in names):
            write_gallery(runs, args.seeds[0], results / "gallery.gif")
    here = Path(__file__).resolve().parent
    readme = here / "README.md" if results.resolve() == here / "results" else None
    print(write_report(results, PARTS, readme))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
