"""The command of grow_diffusers.py: `python grow.py FOLDER --depth insert --add 6 --out OUT`.

grow.py passes a folder of diffusers on to `grow_folder`. The command grows it, prints what has changed, and
on request compares both models (proof_diffusers.py). Left out: anything but depth growth.
"""

import argparse
import contextlib
import shlex
import signal
import sys
from pathlib import Path

from grow_diffusers import Summary, grow, is_diffusers, model_folder, read_json, tree_of
from machine import run_command
from proof_diffusers import import_diffusers, importance, largest_difference
from run import find_checkpoint
from stacking import WHERE

OWN_OPTIONS = ("--at", "--check", "--importance")  # of which grow.py knows nothing


def numbers(text: str) -> list[int]:
    """ "3,7,11" -> [3, 7, 11]."""
    return [int(word) for word in text.split(",")]


def parse_arguments(argv) -> argparse.Namespace:
    """The command line. Raises ValueError for options that need another one."""
    about = "Grow a diffusers model or pipeline on the disk. Without --depth or --at, print its history."
    parser = argparse.ArgumentParser(description=about)
    option = parser.add_argument
    option("folder", help="folder of a diffusers model, or of a pipeline with a transformer")
    option("--depth", choices=WHERE, help="more blocks, and where they go")
    option("--add", type=numbers, metavar="N[,N]", help="for --depth: blocks to add, in all or for each list")
    option("--at", type=numbers, metavar="N,N,...", help="copy exactly these blocks, each right after itself")
    option("--zero", help="which factor of the copies is zero, proj or gate [proj, if the class allows it]")
    option("--out", help="folder for the grown model; it must not exist, except for --check alone")
    option("--check", action="store_true", help="compare FOLDER and OUT, new or already there, by diffusers")
    option("--importance", action="store_true", help="only print how much each block changes its tokens")
    args = parser.parse_args(argv)
    if args.depth and args.at:
        raise ValueError("--depth says where blocks go, and so does --at: give one of them")
    asked = args.depth or args.at
    if asked and args.importance:
        raise ValueError("--importance does not grow: look at it first, then grow")
    for name in ("add", "zero") if args.check else ("add", "zero", "out"):
        if getattr(args, name) and not asked:
            raise ValueError(f"--{name} is for a growth: give --depth or --at too")
    if (asked or args.check) and not args.out:
        raise ValueError("name a folder for the grown model with --out")
    if args.depth and not args.add:
        raise ValueError("say how many blocks to add, with --add")
    return args


def peak_memory() -> str:
    """The most memory that this process has had so far."""
    try:
        import resource
    except ImportError:  # on Windows
        return "unknown"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return f"{peak * unit / 2**20:,.0f} MB"


def report(summary: Summary) -> list[str]:
    """What a growth has done, as lines."""
    lines = []
    for count, (before, after) in summary.changed.items():
        lines.append(f"{count}: {before} -> {after} blocks")
    before, after = summary.parameters
    lines.append(f"parameters: {before / 1e6:,.2f} M -> {after / 1e6:,.2f} M")
    lines.append(f"new blocks: {' '.join(summary.new)}")
    if summary.earlier:
        lines.append(f"blocks of earlier growths, by their new numbers: {' '.join(summary.earlier)}")
    files = "1 file" if summary.files == 1 else f"{summary.files} files"
    if any(block.endswith(".0") for block in summary.new):
        lines.append(
            "block 0 is new: until it is trained, a cache that watches it (FirstBlockCache) skips all"
        )
    size, copied = f"{summary.size / 1e6:,.1f} MB in {files}", f"{summary.copied / 1e6:,.1f} MB"
    lines.append(f"written: {size}; copied: {copied}; peak memory {peak_memory()}")
    return lines


def loading_lines(summary: Summary, name: str) -> list[str]:
    """Lines of Python that load a grown model for training and name its new parameters."""
    folder = str(summary.folder)
    blocks = ", ".join(f'"{block}."' for block in summary.new)
    lines = [
        "import torch, diffusers",
        "# float32: in bfloat16 most updates of a small learning rate are rounded away",
        f"model = diffusers.{name}.from_pretrained({folder!r}, torch_dtype=torch.float32)",
        f"blocks = ({blocks},)",
    ]
    if summary.earlier:
        blocks = ", ".join(f'"{block}."' for block in summary.earlier)
        lines.append(f"# blocks += ({blocks},)  # of earlier growths: add those that were never trained")
    lines.append("new = [p for name, p in model.named_parameters() if name.startswith(blocks)]")
    return lines


def other_transformers(pipeline: Path, out: Path) -> list[str]:
    """A line for each further transformer of a pipeline, such as transformer_2 of Wan 2.2."""
    lines = []
    for folder in sorted(pipeline.glob("transformer_*/")):
        lines.append(
            f"{folder.name} did not grow: run `python grow.py {shlex.quote(str(folder))} ... --out NEW`,"
            f" then put NEW in the place of {out / folder.name}"
        )
    return lines


@contextlib.contextmanager
def in_one_line(what: str):
    """Any error, which may come from diffusers, as a ValueError of one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{what} failed: {type(error).__name__}: {reason}") from None


def check_line(base: Path, grown: Path) -> str:
    """The largest difference of two models, which is 0, as a line. Raises ValueError if it is not."""
    with in_one_line("the check"):
        difference, largest = largest_difference(base, grown)
    if difference != 0:
        raise ValueError(f"{grown} computes something else: it differs by {difference:.2g} of {largest:.2g}")
    line = f"largest difference on random inputs: 0 (largest output {largest:.2g}): the same bits"
    return f"{line}, peak memory {peak_memory()}"


def importance_lines(path: str) -> list[str]:
    """1 - cos(input, output) of each block, with its number for --at."""
    lines = ["--at  1 - cos(input, output)"]
    with in_one_line("--importance"):
        for number, block, value in importance(path):
            lines.append(f"{number:4}  {value:.4f}  {block}")
    return lines


def grow_folder(argv) -> bool:
    """The part of grow.py's command that is done here: whether a word of `argv` (None: of the command line)
    is a diffusers folder, other than an output, or one of OWN_OPTIONS. Then `main` is run."""
    words = sys.argv[1:] if argv is None else argv
    for before, word in zip(["", *words], words, strict=False):
        if word.split("=")[0] in OWN_OPTIONS or (before != "--out" and is_diffusers(word)):
            main(words)
            return True
    return False


def main(argv=None):
    """Grow a diffusers model: `python grow.py FOLDER --depth insert --add 6 --out OUT`."""
    args = parse_arguments(argv)
    if args.importance:
        print("\n".join(importance_lines(args.folder)))
        return
    if not is_diffusers(args.folder):
        find_checkpoint(args.folder)  # its error says what the folder is
        raise ValueError(f"--at and --check are for a folder in diffusers' format, not for {args.folder}")
    folder = model_folder(args.folder)
    if args.check:
        import_diffusers()  # before a long growth
    if not args.depth and not args.at:
        config = read_json(folder / "config.json")
        print(check_line(folder, model_folder(args.out)) if args.check else tree_of(config))
        return
    add = args.add[0] if args.add and len(args.add) == 1 else args.add
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: nothing is left behind
    summary = grow(args.folder, args.out, add, args.depth or "insert", args.zero, args.at)
    config = read_json(summary.folder / "config.json")
    lines = [*report(summary), tree_of(config), *other_transformers(Path(args.folder), Path(args.out)), ""]
    print("\n".join(lines + loading_lines(summary, config["_class_name"])))
    if args.check:
        print("\n" + check_line(folder, summary.folder))


if __name__ == "__main__":
    run_command(main, memory_hint="a tensor must fit, and for --check a model")
