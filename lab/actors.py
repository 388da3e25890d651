"""In which order are complex prompts learned? `python -m lab.actors RUN [RUN ...]`

A run that was trained with --keep has the weights of every validation. This file scores all of them on the
same prompts with the same noise, so that accuracy becomes a curve over training FLOPs: for every attribute,
and for prompts of one, two and three actors. Several runs make one curve if each continues the one before.

    python train.py --data both --keep
    python -m lab.actors runs/base

The scores are those of lab/evaluate.py. The reader sees clips of 8 frames of 32x32, so clips of another size
are resampled, which costs it some certainty. What it reads of *true* clips of the model's own size is written
beside the scores, as the ceiling.

What is kept: results/actors/NAME.json, named after the last run. Points that are in it are not scored again.
`python -m lab.study --report` draws it. Left out: a spread over noise; the points of a curve share theirs.
"""

import argparse
import functools
import json
from pathlib import Path

import torch

from dit import DiTConfig
from draw import render
from lab.evaluate import evaluate, prompt_sets, score_set
from lab.reader import Reader, get_reader
from lab.report import actors_table
from lab.study import find_revision, machine_name
from machine import pick_device, run_command
from run import load_model, write_atomically

ACTOR_SETS = ("seen", "several actors", "long")  # prompts of one actor, and of two or three in two styles
RENDERED_AT_ONCE = 32  # true clips of 16 frames of 64x64 take a few hundred MB


def kept_weights(run: Path) -> list[Path]:
    """The checkpoint directories of a run that --keep has left, by step. Raises FileNotFoundError if there
    are none."""
    found = sorted(run.glob("step_*/model.safetensors"))
    if not found:
        raise FileNotFoundError(f"{run} has no step_N/model.safetensors: train it with --keep")
    return [file.parent for file in found]


@functools.cache
def ceiling(reader: Reader, config: DiTConfig, count: int) -> dict[str, dict[str, float]]:
    """The scores of true clips of a model's size, by prompt set: no model can expect more."""
    device = next(reader.parameters()).device
    scores = {}
    for name in ("seen", "several actors"):
        scenes = prompt_sets(count)[name][0]
        parts = [scenes[i : i + RENDERED_AT_ONCE] for i in range(0, len(scenes), RENDERED_AT_ONCE)]
        videos = torch.cat([render(part, config.frames, config.size, device) for part in parts]) / 127.5 - 1
        scores |= score_set(reader, name, videos, scenes)
    return scores


def score_runs(runs: list[Path], file: Path, reader: Reader, count: int, device: str) -> dict:
    """Score what is not scored yet -> what `file` holds. Raises ValueError if it is about other prompts."""
    result = json.loads(file.read_text()) if file.is_file() else {"count": count, "points": []}
    if result["count"] != count:
        raise ValueError(f"{file} has {result['count']} prompts per set: delete it, or give --count of that")
    done = {point["checkpoint"] for point in result["points"]}
    for weights in (directory for run in runs for directory in kept_weights(run)):
        name = f"{weights.parent.name}/{weights.name}"
        if name in done:
            continue
        model, metadata = load_model(weights)
        scores = evaluate(weights, reader, count, device=device, only=ACTOR_SETS)
        point = {"checkpoint": name, "flops": metadata["flops"]}
        result["points"].append(point | {"scores": scores})
        result["points"].sort(key=lambda point: point["flops"])
        result |= {"revision": find_revision(), "machine": machine_name()}
        result["arguments"] = [json.loads((run / "args.json").read_text()) for run in runs]
        result["ceiling"] = ceiling(reader, model.config, count)
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
