"""In which order are complex prompts learned? `python -m lab.actors RUN [RUN ...]`

A run that was trained with --keep has the weights of every validation. This file scores all of them on the
same prompts with the same noise, so that accuracy becomes a curve over training FLOPs: for every attribute,
and for prompts of one, two and three actors. Several runs make one curve if each continues the one before.
Who deletes some of the weights (step_N) first gets fewer points, and gets them sooner.

    python train.py --data both --keep
    python -m lab.actors runs/base

The scores are those of lab/evaluate.py. Its ceiling, what the reader reads of *true* clips of the size of the
last point, is written beside them.

What is kept: results/actors/NAME.json, named after the last run. Points that are in it are not scored again.
`python -m lab.study --report` draws it. Left out: a spread over noise; the points of a curve share theirs.
"""

import argparse
import hashlib
import json
from pathlib import Path

from lab.evaluate import ceiling, evaluate
from lab.reader import Reader, get_reader
from lab.report import actors_table
from lab.study import find_revision, machine_name
from machine import pick_device, run_command
from run import load_model, write_atomically
from train import RESUMABLE

ACTOR_SETS = ("seen", "several actors", "long")  # prompts of one actor, and of two or three in two styles


def kept_weights(run: Path) -> list[Path]:
    """The checkpoint directories of a run that --keep has left, by step. Raises FileNotFoundError if there
    are none."""
    found = sorted(run.glob("step_*/model.safetensors"))
    if not found:
        raise FileNotFoundError(f"{run} has no step_N/model.safetensors: train it with --keep")
    return [file.parent for file in found]


def check_trainings(file: Path, before: list[dict], now: list[dict]):
    """Raise ValueError if a run was trained anew, with other options, since `file` was written."""
    old = {Path(options["out"]).name: options for options in before}
    for options in now:
        name = Path(options["out"]).name
        for option, value in options.items() if name in old else ():
            if old[name].get(option) != value and option not in RESUMABLE:
                raise ValueError(f"{file} is about another training called {name}: delete it")


def score_runs(runs: list[Path], file: Path, reader: Reader, count: int, device: str) -> dict:
    """Score what is not scored yet -> what `file` holds. Raises ValueError if it is about other prompts or
    other trainings."""
    result = json.loads(file.read_text()) if file.is_file() else {"count": count, "points": []}
    if result["count"] != count:
        raise ValueError(f"{file} has {result['count']} prompts per set: delete it, or give --count of that")
    arguments = [json.loads((run / "args.json").read_text()) for run in runs]
    check_trainings(file, result.get("arguments", []), arguments)
    last, _ = load_model(kept_weights(runs[-1])[-1])
    result |= {"arguments": arguments, "ceiling": ceiling(reader, last.config, count)}
    done = {point["checkpoint"]: point.get("weights") for point in result["points"]}
    for weights in (directory for run in runs for directory in kept_weights(run)):
        name = f"{weights.parent.name}/{weights.name}"
        content = (weights / "model.safetensors").read_bytes()
        stamp = hashlib.sha256(content).hexdigest()[:16]
        if done.get(name, stamp) not in (stamp, None):  # None: from before there were stamps
            raise ValueError(f"{file} is about other weights of {name}: delete it")
        if name in done:
            continue
        _, metadata = load_model(weights)
        scores = evaluate(weights, reader, count, device=device, only=ACTOR_SETS)
        point = {"checkpoint": name, "weights": stamp, "flops": metadata["flops"], "scores": scores}
        result["points"].append(point)
        result["points"].sort(key=lambda point: point["flops"])
        result |= {"revision": find_revision(), "machine": machine_name()}
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(result))
    return result


def main(argv=None):
    """Score the kept weights of one run, or of several that continue each other."""
    parser = argparse.ArgumentParser(
        description="Accuracy on prompts of one, two and three actors, over the FLOPs of training."
    )
    parser.add_argument("runs", nargs="+", help="runs that were trained with --keep; each continues the last")
    parser.add_argument("--count", type=int, default=100, help="prompts per set (100)")
    parser.add_argument("--results", default="results", help="folder of the results (results)")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise ValueError("--count must be at least 1")
    runs = [Path(run) for run in args.runs]
    reader = get_reader(device=pick_device(args.device))
    file = Path(args.results) / "actors" / f"{runs[-1].name}.json"
    print(actors_table(score_runs(runs, file, reader, args.count, args.device)))
    print(f"written to {file}")


if __name__ == "__main__":
    run_command(main, "lower --count")
