"""The study: what the paper claims, tested at a scale that a laptop can afford.

**The question so far: does a language model help?** ModelGrow (arXiv 2412.18966) adds to every block a
cross-attention to the hidden states of an LLM, and says that prompts are followed better. Here a base reads
its prompts with MiniLM, and every arm goes on from the same base of its seed, for the same number of steps on
the same clips and captions in the same order:

    base encoder      without an LLM: what more training alone does
    llm LAYERS        with the LLM branch, on its last layer, its middle one, or the mean of all
    ..., refiner      two blocks in front of the branch, in which the LLM's tokens look at each other
    wrong captions    a control: the LLM reads the caption of another clip; what is gained is parameters
    minilm twice      a control: the new branch reads MiniLM once more; what is gained is a branch
    ..., drop text    a quarter of the captions are hidden from MiniLM: the LLM has to be listened to

**What is measured.** The reader (evaluate.py) scores clips for prompts never seen: in the words of the
training captions, in words that no training caption has, in sentences built as none is, and of two or three
actors. Differences are taken within a seed, from arm to base encoder. The spread is over seeds, which decide
the weights of base and branch, the batches and the noise; the clips, their captions and the test prompts are
the same for all.

**What is kept.** One JSON per arm and seed in results/: arguments, revision of the code, machine, curve of
the loss, scores. Finished ones are skipped, a run that was killed goes on from its checkpoint, and `--report`
makes the tables from the JSON alone.

Left out so far: everything about depth, width and equal FLOPs.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F

from evaluate import Reader, evaluate, get_reader, prove, table
from text_encoder import NULL_PROMPT, Prompts
from train import parse_arguments, train

BASE = "--preset nano --steps 1500 --every 500 --decay 0"
GO_ON = "--data basic --words varied --clips 8192 --steps 2000 --every 500"
LLM = "--grow llm --llm-features "
ARMS = {  # what training is told beyond GO_ON; the first arm is what the others are compared with
    "base encoder": "",
    "llm last": LLM + "last",
    "llm middle": LLM + "middle",
    "llm mean": LLM + "mean",
    "llm last, refiner": LLM + "last --refiner 2",
    "llm middle, refiner": LLM + "middle --refiner 2",
    "llm mean, refiner": LLM + "mean --refiner 2",
    "wrong captions": LLM + "mean",
    "minilm twice": LLM + "mean",
    "llm mean, drop text": LLM + "mean --drop-text 0.25",
}
QUICK = " --quick --clips 32 --steps 2"


class WrongPrompts(Prompts):
    """The control of the content: the LLM reads the next caption of the batch; the null prompt stays."""

    def batch(self, *texts, whole=False):
        """As `Prompts.batch`."""
        real = [text for text in texts[-1] if text != NULL_PROMPT]
        others = iter(real[1:] + real[:1])
        wrong = [text if text == NULL_PROMPT else next(others) for text in texts[-1]]
        return super().batch(texts[0], wrong, whole=whole)


class SamePrompts(Prompts):
    """The control of the branch: in the LLM's place the base's encoder once more, filled up with zeros."""

    def __init__(self, texts, header, llm_dim):
        super().__init__(texts, header, 0)
        self.llm_dim = llm_dim
        self.streams *= 2 if llm_dim else 1

    def batch(self, *texts, whole=False):
        """As `Prompts.batch`."""
        text, mask, *again = super().batch(*texts, whole=whole)
        return (
            (text, mask, F.pad(again[0], (0, self.llm_dim - text.shape[-1])), again[1])
            if again
            else (text, mask)
        )


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
    """The commit that this code is at, with a + if files differ from it; "unknown" outside of git."""
    here = Path(__file__).parent
    try:
        commit, changes = (
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changes.strip() else "")


REVISION = find_revision()  # of the code that runs, whatever is committed while it does


def begun(run: Path) -> bool:
    """Whether there is something to go on from."""
    return any((run / name).is_dir() for name in ("checkpoint", "checkpoint.old"))


def run_arm(arm, seed, runs: Path, results: Path, reader, quick=False) -> dict:
    """Train an arm and score it -> what is written to results/ARM-SEED.json, or what is there already. "base"
    is the base of that seed, from which the others go on. Raises ValueError if what is there was made with
    other arguments."""
    file = results / f"{arm.replace(', ', ' ').replace(' ', '-')}-{seed}.json"
    run, base = runs / file.stem, runs / f"base-{seed}"
    tail = f"--seed {seed}{QUICK if quick else ''}".split()
    of_base = [*BASE.split(), *tail]
    how = of_base if arm == "base" else [*GO_ON.split(), *ARMS[arm].split(), *tail]
    if file.is_file():
        if (result := json.loads(file.read_text()))["arguments"] != how:
            raise ValueError(f"{file} was made with other arguments: delete it, or name another --results")
        return result
    print(f"{arm}, seed {seed}: python train.py {' '.join(how)}")
    read = {"wrong captions": WrongPrompts, "minilm twice": SamePrompts}.get(arm, Prompts)
    if arm != "base" and not begun(base):  # as in a fresh clone, where its results are there and it is not
        train(parse_arguments([*of_base, "--out", str(base)]))
    going_on = [] if arm == "base" else ["--from", str(base)]
    torch.compiler.reset()  # the graphs of another run do not fit
    where = ["--out", str(run)]
    train(parse_arguments(["--resume", *where] if begun(run) else [*how, *going_on, *where]), read=read)
    scores = evaluate(run, reader, 4 if quick else 200, seed=seed, read=read)
    curve = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    result = {"arm": arm, "seed": seed, "arguments": how, "revision": REVISION, "machine": machine()}
    result |= {"scores": scores, "curve": curve}
    results.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(".tmp")
    whole.write_text(json.dumps(result))
    whole.replace(file)
    return result


def attributes(scores) -> float:
    """The scores of a set of prompts -> the mean over its attributes."""
    return mean(value for name, value in scores.items() if name not in ("all", "place"))


def spread(values) -> str:
    """Mean and standard deviation over seeds, "0.512 ± 0.011"; nothing of nothing."""
    if not values:
        return ""
    return f"{mean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def markdown(titles, rows) -> str:
    """A table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(results: Path) -> str:
    """The tables in Markdown, from the JSON files in `results` alone. Raises FileNotFoundError if there are
    none."""
    found = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
    by_arm = {arm: {r["seed"]: r for r in found if r["arm"] == arm} for arm in ("base", *ARMS)}
    by_arm = {arm: by_seed for arm, by_seed in by_arm.items() if by_seed}
    if not by_arm:
        raise FileNotFoundError(f"there are no results in {results}: run `python study.py` first")
    sets = [name for name in found[0]["scores"] if name != "val_loss"]
    first, *_ = ARMS

    def row(arm, read):  # one number of every seed
        return spread([read(result["scores"]) for result in by_arm[arm].values()])

    def gain(arm, name):  # of an arm over the first one, within the seeds that both have
        both = sorted(by_arm[arm].keys() & by_arm.get(first, {}).keys())
        return [
            attributes(by_arm[arm][seed]["scores"][name]) - attributes(by_arm[first][seed]["scores"][name])
            for seed in both
        ]

    means = [
        [
            arm,
            *(row(arm, lambda scores, name=name: attributes(scores[name])) for name in sets),
            row(arm, lambda scores: mean(scores["val_loss"])),
        ]
        for arm in by_arm
    ]
    gains = [
        [arm, *(spread(gain(arm, name)) for name in sets)] for arm in by_arm if arm not in ("base", first)
    ]
    text = [
        f"Seeds: {', '.join(map(str, sorted({r['seed'] for r in found})))}. Mean ± standard deviation over"
        " seeds. The mean over the attributes of each set of prompts, and the validation loss on `basic`:",
        markdown(["arm", *sets, "validation loss"], means),
        f"Gain over *{first}*, within each seed:",
        markdown(["arm", *sets], gains),
    ]
    for name in sets:
        columns = [column for column in found[0]["scores"][name] if column != "place"]
        rows = [
            [arm, *(row(arm, lambda scores, c=c, name=name: scores[name][c]) for c in columns)]
            for arm in by_arm
        ]
        text += [f"{name.capitalize()}, by attribute:", markdown(["arm", *columns], rows)]
    revisions = sorted({f"{r['revision'][:10]} on {r['machine']}" for r in found})
    return "\n\n".join(["# Results", *text, f"Measured at {'; '.join(revisions)}."]) + "\n"


def main(argv=None):
    """Run what is not there yet, then report: `python study.py`."""
    parser = argparse.ArgumentParser(
        description="Test the paper's claims at toy scale; writes one JSON per arm and seed, and README.md."
    )
    names = "; ".join(ARMS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), metavar="ARM", help=f"of: {names} (all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="(0 1 2)")
    parser.add_argument("--runs", help="folder for the runs (runs/study, or runs/study-quick)")
    parser.add_argument("--results", help="folder for the JSON and the report (results, or runs/study-quick)")
    parser.add_argument("--quick", action="store_true", help="all arms in seconds, one seed; nothing learned")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is there")
    args = parser.parse_args(argv)
    if unknown := [arm for arm in args.arms if arm not in ARMS]:
        raise ValueError(f"no arm is called {unknown[0]!r}; there are {names}")
    quick = "runs/study-quick" if args.quick else None
    runs, results = Path(args.runs or quick or "runs/study"), Path(args.results or quick or "results")
    if not args.report:
        reader = Reader().eval() if args.quick else get_reader()
        if not args.quick:
            print(table(prove(reader)))
        for seed in args.seeds[:1] if args.quick else args.seeds:
            for arm in dict.fromkeys(("base", next(iter(ARMS)), *args.arms)):
                run_arm(arm, seed, runs, results, reader, args.quick)
    text = report(results)
    (results / "README.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from the last checkpoint")
    except (ValueError, OSError) as error:  # whatever a user can mend
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
