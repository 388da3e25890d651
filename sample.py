"""From a prompt to a video file: `python sample.py "a cat surfing"`.

The prompt goes through the text encoders of the model (text_encoder.py), the solver follows the flow from
noise to a clip (flow.py), and the clip is written as MP4 and GIF (video.py). Which model: `--from`, or the
newest run below runs/, or else the included one, pretrained/.

**Re-captions** (`--recaption`). The LLM of a grown model reads the prompt and after it a longer version that
it was asked to write (ModelGrow, figure 2; recaption.py); the small encoder reads the prompt alone. What the
LLM read lies beside the video, as a text file.

Left out: image conditioning, several aspect ratios, a server.
"""

import time

START = time.perf_counter()  # the clock includes the imports, which take seconds

import argparse
import math
import re
from pathlib import Path

import torch
from tqdm import tqdm

from attention import BACKENDS
from dit import check_shape, set_attention
from flow import GUIDANCE, GUIDANCE_INTERVAL, STEPS, solve
from machine import autocast, decode_text, pick_device, pick_precision, run_command
from recaption import recaption
from run import load_model, newest_checkpoint, runs_folder
from text_encoder import NULL_PROMPT, LanguageModel, Prompts, encoders_of
from video import to_uint8, write_video

BATCH = 16  # clips that are drawn at the same time


def parse_arguments(argv=None):
    """The command line -> its options. Raises ValueError for numbers out of range."""
    parser = argparse.ArgumentParser(description="Make a video of a prompt; writes an MP4 and a GIF.")
    add = parser.add_argument
    add("prompt", nargs="?", help='what to show, such as "a cat surfing"')
    add("--prompts", help="a text file with a prompt per line, instead of the one prompt")
    add("--from", dest="source", help="run or checkpoint (the newest run, else pretrained/)")
    add(
        "--recaption", action="store_true", help="let the model's LLM rewrite the prompt in more detail (off)"
    )
    add("--out", default="samples", help="folder for the videos (samples)")
    add("--num", type=int, default=1, help="videos per prompt (1)")
    add("--seed", type=int, default=0, help="another seed gives other videos (0)")
    add("--frames", type=int, help="frames (as many as the model was trained on)")
    add("--size", type=int, help="pixels per side (as many as the model was trained on)")
    add("--steps", type=int, default=STEPS, help=f"steps of the solver ({STEPS})")
    add("--method", default="heun", choices=("heun", "euler"), help="solver (heun)")
    add(
        "--guidance", type=float, default=GUIDANCE, help=f"classifier-free guidance; 1 is none ({GUIDANCE:g})"
    )
    add(
        "--interval", type=float, nargs=2, default=GUIDANCE_INTERVAL, metavar=("FROM", "TO"),
        help="timesteps at which guidance acts; 0 is noise, 1 the clip (0 0.6)",
    )  # fmt: skip
    add("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, mps, ... (auto)")
    add("--attention", default="auto", choices=BACKENDS, help="backend of attention.py (auto)")
    args = parser.parse_args(argv)
    for name in ("num", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.guidance < math.inf:
        raise ValueError(f"--guidance is {args.guidance}; it must be a number from 0 on")
    begin, end = args.interval
    if not 0 <= begin < end <= 1:
        raise ValueError(f"--interval is {begin:g} {end:g}; it must be two timesteps from 0 to 1, in order")
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError('give one prompt, as in `python sample.py "a cat surfing"`, or --prompts FILE')
    return args


def read_prompts(args) -> list[str]:
    """The prompts of the command line or of its file, without empty lines. Raises ValueError if there is
    none, or if they are not UTF-8."""
    lines = [args.prompt]
    if args.prompts is not None:
        try:
            lines = decode_text(Path(args.prompts).read_bytes()).splitlines()
        except ValueError as error:
            raise ValueError(f"{args.prompts} cannot be read: {error}") from None
    lines = [line.strip() for line in lines]
    prompts = [line for line in lines if any(c.isprintable() and not c.isspace() for c in line)]
    if not prompts:
        raise ValueError("the prompt is empty" if args.prompts is None else f"{args.prompts} has no prompt")
    try:
        "".join(prompts).encode()
    except UnicodeEncodeError:  # from bytes of the command line
        raise ValueError("the prompt is not UTF-8") from None
    return prompts


def recaptioned(prompts: list[str], model, metadata, device) -> list[str]:
    """Each prompt with a re-caption by the model's LLM after it, or if none is faithful, the prompt alone."""
    _, (name, layers) = encoders_of(metadata, model.config.llm_dim)
    llm = LanguageModel(name, layers, device)
    texts = []
    for prompt in tqdm(prompts, "re-captioning"):
        reply, reason = recaption(llm, prompt)
        tqdm.write(f"re-caption: {reply}" if reply else f"{prompt[:60]!r} is used as it is: {reason}")
        texts.append(f"{prompt}. {reply}" if reply else prompt)
    return texts


def initial_noise(seed: int, number: int, shape) -> torch.Tensor:
    """The noise of video `number` of any prompt: --num 4 begins with the videos of --num 2."""
    generator = torch.Generator().manual_seed((seed * 100_003 + number) % 2**63)
    return torch.randn(shape, generator=generator)


def draw(model, prompt, null, args, shape, device):
    """All videos -> (row of the prompt, uint8 (T, H, W, 3)) one after the other. prompt: features (B, L, D)
    and mask (B, L) of each text encoder; null: those of the null prompt."""
    jobs = [(row, number) for row in range(len(prompt[0])) for number in range(args.num)]
    batches = [jobs[i : i + BATCH] for i in range(0, len(jobs), BATCH)]
    precision = pick_precision("auto", device)
    with tqdm(total=args.steps * len(batches), desc="sampling", unit="step") as bar:
        for batch in batches:
            rows = torch.tensor([row for row, _ in batch], device=device)
            noise = torch.stack([initial_noise(args.seed, number, shape) for _, number in batch]).to(device)
            conditions = [tensor[rows] for tensor in prompt], null
            guidance = args.guidance, args.interval
            with autocast(device, precision):
                clips = solve(model, noise, *conditions, args.steps, *guidance, args.method, bar.update)
            for (row, _), frames in zip(batch, to_uint8(clips), strict=True):
                yield row, frames


def file_name(prompt: str) -> str:
    """A prompt -> a file name: "A cat, surfing!" -> "a-cat-surfing", at most 80 bytes."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-").encode(errors="ignore")
    return name[:80].decode(errors="ignore") or "video"


def unused_name(name: str, used: set[str]) -> str:
    """`name`, or NAME-2, NAME-3, ..., the first that is not in `used`: no video of a call overwrites
    another."""
    candidate, number = name, 1
    while candidate in used:
        number += 1
        candidate = f"{name}-{number}"
    used.add(candidate)
    return candidate


def newest_model() -> Path:
    """The newest checkpoint. Prints a note about newer --quick runs, which are passed over."""
    chosen = newest_checkpoint()
    time_of_chosen = (chosen / "model.safetensors").stat().st_mtime
    for file in Path(runs_folder(quick=True)).glob("*/checkpoint/model.safetensors"):
        run = file.parents[1]
        if file.stat().st_mtime > time_of_chosen:
            print(f"note: {run} was made with --quick and is passed over; use --from {run}")
    return chosen


def main(argv=None):
    """Make videos: `python sample.py "a cat surfing"`."""
    args = parse_arguments(argv)
    prompts = read_prompts(args)
    device = pick_device(args.device)
    source = args.source or newest_model()
    model, metadata = load_model(source)
    print(f"model: {source}")
    frames = model.config.frames if args.frames is None else args.frames
    size = model.config.size if args.size is None else args.size
    check_shape(model.config, frames, size)
    if args.recaption and not model.config.llm_dim:
        raise ValueError("--recaption needs a model that reads with an LLM: train.py --grow llm makes one")
    set_attention(model.to(device), args.attention)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = recaptioned(prompts, model, metadata, device) if args.recaption else prompts  # what the LLM reads
    reader = Prompts([*prompts, *texts], metadata, model.config.llm_dim, device)
    prompt, null = reader.gather(reader.rows(prompts), reader.rows(texts)), reader.batch([NULL_PROMPT])
    read = time.perf_counter() - START
    used: set[str] = set()
    for row, clip in draw(model, prompt, null, args, (3, frames, size, size), device):
        path = out / unused_name(file_name(prompts[row]), used)
        files = write_video(path, clip, metadata["fps"])
        recaption_file = path.with_name(f"{path.name}.recaption.txt")
        recaption_file.unlink(missing_ok=True)  # of an earlier video of this name
        if args.recaption:
            recaption_file.write_text(texts[row] + "\n", "utf-8")
        tqdm.write("  ".join(map(str, files)))
    total = time.perf_counter() - START
    print(f"{total:.1f} s: {read:.1f} s until the prompt was read, {total - read:.1f} s to draw and write")


if __name__ == "__main__":
    run_command(main, "lower --num, --size or --frames")
