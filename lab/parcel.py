"""Results of a machine that keeps nothing: packed into a few small files, and unpacked at home.

lab/on_gpu.sh trains and scores on a machine that keeps nothing. `python -m lab.parcel OUT RUN ...` leaves
there what is worth keeping, and `python -m lab.study --take OUT` puts it into the repository at home:

    results.tar.gz       the JSON files of results/, the picture of an evaluation, and what the runs wrote
                         down about themselves
    model.safetensors    the last run's EMA weights in bfloat16 -> pretrained/
    samples.gif          its last samples -> assets/

bfloat16 halves the file. It keeps the exponent of float32 and 8 bits of the mantissa, which is what matrix
products read of a weight under autocast. Left out: training states, which are large; a run cannot be resumed
from a parcel.
"""

import argparse
import json
import shutil
import tarfile
import zlib
from pathlib import Path

from machine import run_command
from run import PRETRAINED, load_model, save_model

HOME = PRETRAINED.parent
KEPT = ("args.json", "metrics.jsonl")  # of a run, beside its weights


def pack(out: Path, results: Path, runs: list[Path]):
    """Write the parcel of `results` and of runs, of which the last is the model to keep."""
    out.mkdir(parents=True, exist_ok=True)
    new = out / "results.tar.gz.new"  # the last parcel stays until this one is whole
    with tarfile.open(new, "w:gz") as tar:
        for file in sorted([*results.rglob("*.json"), *results.rglob("evaluation.gif")]):
            tar.add(file, file.relative_to(results))
        for run in runs:
            for name in KEPT:
                tar.add(run / name, Path("pretrained") / f"{run.name}-{name}")
    new.replace(out / "results.tar.gz")
    if runs:
        model, metadata = load_model(runs[-1])
        weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
        save_model(out, weights, model.config, **metadata)
        shutil.copy(max((runs[-1] / "samples").glob("step_*.gif")), out / "samples.gif")


def take(out: Path, home: Path = HOME) -> list[Path]:
    """Put a parcel into the repository `home` -> the files that were written. Raises FileNotFoundError if
    there is no parcel, ValueError if it is damaged."""
    if not (out / "results.tar.gz").is_file():
        raise FileNotFoundError(f"{out} has no results.tar.gz: lab/on_gpu.sh writes one")
    try:
        with tarfile.open(out / "results.tar.gz") as tar:
            written = [home / "results" / name for name in tar.getnames()]  # a damaged parcel ends here
            if (out / "model.safetensors").is_file():  # the scores are those of the model before
                for name in ("evaluation.json", "evaluation.gif"):
                    (home / "results" / "pretrained" / name).unlink(missing_ok=True)
            tar.extractall(home / "results", filter="data")  # nothing outside of it, no links, no devices
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{out / 'results.tar.gz'} is damaged: {error}") from None
    for name, folder in (("model.safetensors", "pretrained"), ("samples.gif", "assets")):
        if (out / name).is_file():
            written.append(Path(shutil.copy(out / name, home / folder / name)))
    return written


def main(argv=None):
    """Write a parcel."""
    parser = argparse.ArgumentParser(description="Pack results and the last run's weights into a folder.")
    parser.add_argument("out", help="folder of the parcel")
    parser.add_argument("runs", nargs="*", help="runs; the last one is the included model")
    parser.add_argument("--results", default="results", help="folder of the results (results)")
    args = parser.parse_args(argv)
    pack(Path(args.out), Path(args.results), [Path(run) for run in args.runs])
    sizes = {file.name: file.stat().st_size for file in sorted(Path(args.out).iterdir())}
    print(json.dumps(sizes, indent=1))


if __name__ == "__main__":
    run_command(main)
