"""From a prompt to a video file: solve the ODE of rectified flow.

Training (train.py) draws a straight line from noise to each clip, x_t = t x + (1 - t) noise, and the model
learns to predict the clean clip x from a point on it. The direction of the line is then

    v(x_t, t) = (x_predicted - x_t) / (1 - t)

and a video is made by following v from pure noise at t = 0 to t = 1. The lines of many clips cross, so the
path that v describes bends, and it takes some steps: `euler` follows the tangent, `heun` averages the
tangents at both ends of a step, which costs two evaluations and has an error of second order. The last step
is always Euler's, and lands exactly on the predicted clip, so that nothing is ever divided by zero.

**The last step begins at t = 0.75**, the others divide the time before it evenly. Later times are hardly ever
drawn in training (flow.py), and at some of them a model errs: with steps that divide all of the time, the
model that comes with the repository drew 0.66 of 100 seen prompts right in six of them and 0.98 in ten, since
the last of six begins at t = 0.83; with these it is 1.00 and 0.99.

**Guidance** (classifier-free, arXiv 2207.12598). The model was also trained with the null prompt, so it knows
what clips look like in general; moving away from that, x = x_null + guidance (x_prompt - x_null), sharpens
what the prompt adds. Guidance 1 means none. Within the `interval` of times only (arXiv 2404.07724): near t =
0 guidance takes variety away, near t = 1 it does nothing but cost time.

**Re-captions** (`--recaption`). The LLM of a grown model reads the prompt and behind it a longer one that it
was asked to write (ModelGrow, figure 2; text_encoder.py); the small encoder reads the prompt alone. What was
read lies beside the video, as a text file.

Left out: distilled and adaptive solvers, negative prompts, and image conditioning.
"""

import time

START = time.perf_counter()  # the clock runs during the imports, which take seconds

import argparse
import math
import re
import sys
from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model
from dit import check_shape
from draw import FPS
from text_encoder import NULL_PROMPT, bf16_is_fast, encode, encoders, make_encoder

STEPS, GUIDANCE, INTERVAL, LAST = 10, 3.0, (0.0, 0.6), 0.75


@torch.no_grad()
def solve(
    model, noise, prompt, null, steps=STEPS, guidance=GUIDANCE,
    interval=INTERVAL, method="heun", progress=None, last=LAST,
):  # fmt: skip
    """Follow the flow from noise to clips.

    noise (B, 3, T, H, W) standard normal; prompt, features (B, L, D) and mask (B, L) of each text encoder in
    turn; null, the same for the null prompt, (1, L', D) with L' <= L; `guidance` is applied where
    interval[0] <= t <= interval[1]; `method` is "heun" or "euler"; `progress` is called after every step; the
    last step begins at time `last` -> clips (B, 3, T, H, W), about in [-1, 1].
    """
    if method not in ("heun", "euler"):
        raise ValueError(f"no solver is called {method!r}; there are heun and euler")
    B = len(noise)
    both = [torch.cat([full, torch.zeros_like(full)]) for full in prompt]
    for full, empty in zip(both, null, strict=True):
        full[B:, : empty.shape[1]] = empty

    def velocity(x, t):
        times = x.new_full((B,), t)
        if guidance == 1 or not interval[0] <= t <= interval[1]:
            clean = model(x, times, *prompt)
        else:  # the prompt and the null prompt in one batch
            prompted, unprompted = model(torch.cat([x, x]), torch.cat([times, times]), *both).chunk(2)
            clean = unprompted + guidance * (prompted - unprompted)
        return (clean.float() - x) / (1 - t)

    stops = [last * i / max(1, steps - 1) for i in range(steps)] + [1.0]
    x = noise
    for i in range(steps):
        t, t_next = stops[i], stops[i + 1]
        v = velocity(x, t)
        if method == "heun" and i < steps - 1:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
        if progress:
            progress()
    return x


def to_uint8(video):
    """(..., 3, T, H, W) in [-1, 1] -> uint8 (..., T, H, W, 3), what image libraries want."""
    return ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).movedim(-4, -1).cpu().numpy()


def newest_checkpoint(root: Path = Path("runs")) -> Path:
    """The checkpoint written last in any run below `root`, else pretrained/. Raises FileNotFoundError if
    there is none."""
    files = [*root.glob("*/checkpoint/model.safetensors"), *root.glob("*/checkpoint.old/model.safetensors")]
    if files:
        return max(files, key=lambda f: f.stat().st_mtime).parent
    if Path("pretrained/model.safetensors").is_file():
        return Path("pretrained")
    raise FileNotFoundError(
        "there is no trained model yet: run `python train.py` first, or name one with --from"
    )


def write_video(path: Path, frames, fps=FPS):
    """uint8 frames (T, H, W, 3) -> `path`.mp4 and `path`.gif, enlarged by a whole factor to at least 256
    pixels. Both are written under other names and renamed, so that a file is whole or absent."""
    factor = max(1, math.ceil(256 / frames.shape[1]))
    frames = frames.repeat(factor, 1).repeat(factor, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    mp4, gif = (path.parent / f".{path.name}.{end}" for end in ("mp4", "gif"))
    # A clip of a second plays four times, since many players stop at the end of a file.
    iio.imwrite(
        mp4,
        np.tile(frames, (4, 1, 1, 1)),
        plugin="pyav",
        codec="libx264",
        fps=fps,
        out_pixel_format="yuv420p",
    )
    iio.imwrite(gif, frames, plugin="pillow", duration=1000 / fps, loop=0)
    mp4.replace(path.parent / f"{path.name}.mp4")
    gif.replace(path.parent / f"{path.name}.gif")


def file_name(prompt: str) -> str:
    """A prompt -> a file name: "A cat, surfing!" -> "a-cat-surfing", at most 80 bytes."""
    name = re.sub(r"\W+", "-", prompt.lower()).strip("-").encode(errors="ignore")
    return name[:80].decode(errors="ignore") or "video"


def pick_device(name):
    """ "auto" -> the GPU if there is one, else the CPU. Raises ValueError for a device that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # where Triton launches its kernels
        return device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name!r} here: {str(error).splitlines()[0]}") from None


def pick_precision(name, device):
    """ "auto" -> bfloat16 where the machine multiplies it faster than float32, else None, which is float32
    throughout."""
    if name == "auto":
        name = "bf16" if bf16_is_fast(device.type) else "fp32"
    return torch.bfloat16 if name == "bf16" else None


def out_of_memory(error) -> bool:
    """Whether an error says that memory ran out, on a GPU or a CPU."""
    said = ("out of memory", "allocate memory", "bad_alloc", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(words in str(error) for words in said)


def autocast(device, precision):
    """The context in which a model runs: matrix products in `precision`, or all in float32 if that is
    None."""
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


def parse_arguments(argv=None):
    """The command line -> its arguments."""
    parser = argparse.ArgumentParser(description="Make a video of a prompt; writes an MP4 and a GIF.")
    parser.add_argument("prompt", nargs="?", help='what to show, such as "a cat surfing"')
    parser.add_argument("--prompts", help="a text file with a prompt per line, instead of the one prompt")
    parser.add_argument("--from", dest="source", help="run or checkpoint; the newest run, else pretrained/")
    parser.add_argument(
        "--recaption", action="store_true",
        help="let the model's LLM rewrite the prompt in more detail first, and read that too (off)",
    )  # fmt: skip
    parser.add_argument("--out", default="samples", help="folder for the videos (samples)")
    parser.add_argument("--num", type=int, default=1, help="videos per prompt (1)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives other videos (0)")
    parser.add_argument("--frames", type=int, help="frames; as many as the model was trained on")
    parser.add_argument("--size", type=int, help="pixels per side; as many as the model was trained on")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"steps of the solver ({STEPS})")
    parser.add_argument("--method", default="heun", choices=("heun", "euler"), help="solver (heun)")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help=f"1 is none ({GUIDANCE:g})")
    parser.add_argument(
        "--interval", type=float, nargs=2, default=INTERVAL, metavar=("FROM", "TO"),
        help="times at which guidance acts; 0 is noise, 1 the clip (0 0.6)",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu or cuda")
    return parser.parse_args(argv)


def read_prompts(args) -> list[str]:
    """The prompts of the command line or of its file, without empty lines."""
    if (args.prompt is None) == (args.prompts is None):
        raise ValueError(
            'give either one prompt, as in `python sample.py "a cat surfing"`, or --prompts FILE'
        )
    lines = [args.prompt] if args.prompts is None else Path(args.prompts).read_text("utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(
            "the prompt is empty" if args.prompts is None else f"there is no prompt in {args.prompts}"
        )
    return prompts


def recaptioned(llm, prompt: str) -> str:
    """The prompt with the LLM's re-caption behind it, or if that is of no use the prompt, and a line about
    it."""
    reply, reason = llm.recaption(prompt)
    tqdm.write(f"re-caption: {reply}" if reply else f"{prompt[:60]!r} is used as it is: {reason}")
    return f"{prompt}. {reply}" if reply else prompt


def main(argv=None):
    """Make videos: `python sample.py "a cat surfing"`."""
    clock = [("imports", time.perf_counter() - START)]
    lap = lambda name: clock.append((name, time.perf_counter() - START - sum(s for _, s in clock)))  # noqa: E731
    args = parse_arguments(argv)
    prompts = read_prompts(args)
    for name in ("num", "steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    device = pick_device(args.device)
    model, header = load_model(args.source or newest_checkpoint())
    model.to(device)
    frames = model.config.frames if args.frames is None else args.frames
    size = model.config.size if args.size is None else args.size
    check_shape(model.config, frames, size)
    if args.recaption and not model.config.llm_dim:
        raise ValueError("--recaption needs a model that reads with an LLM: train.py --grow llm makes one")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    lap("model")

    prompt, null = [], []  # features and mask of each encoder
    texts = prompts
    for name, layers in encoders(header, model.config.llm_dim):
        encoder = None  # not needed for texts that it has read before
        if args.recaption and layers:
            encoder = make_encoder(name, layers)
            texts = [recaptioned(encoder, text) for text in tqdm(prompts, "re-captioning")]
        features = encode(texts, name, layers, encoder)
        prompt += features.batch(texts)
        null += features.batch([NULL_PROMPT])
    lap("text")

    def draw(seed, number):  # by number, so that --num 4 begins with the videos of --num 2
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        return torch.randn(3, frames, size, size, generator=generator)

    jobs = [(prompt, number) for prompt in range(len(prompts)) for number in range(args.num)]
    written = []
    with tqdm(total=args.steps * math.ceil(len(jobs) / 16), desc="sampling", unit="step") as bar:
        for start in range(0, len(jobs), 16):
            rows = torch.tensor([prompt for prompt, _ in jobs[start : start + 16]])
            noise = torch.stack([draw(args.seed, number) for _, number in jobs[start : start + 16]])
            given, empty = [v[rows].to(device) for v in prompt], [v.to(device) for v in null]
            how = args.steps, args.guidance, args.interval, args.method, bar.update
            with autocast(device, pick_precision("auto", device)):
                clips = solve(model, noise.to(device), given, empty, *how)
            written += list(to_uint8(clips))
    lap("sampling")
    used = Counter()
    for (row, _), frames_of_clip in zip(jobs, written, strict=True):
        name = file_name(prompts[row])
        used[name] += 1  # a second video of one name is name-2, and none is lost
        path = out / (name if used[name] == 1 else f"{name}-{used[name]}")
        write_video(path, frames_of_clip, header["fps"])
        beside = path.with_name(f"{path.name}.recaption.txt")
        beside.unlink(missing_ok=True)  # of an earlier video of this name
        if args.recaption:
            beside.write_text(texts[row] + "\n", "utf-8")
        print(f"{path}.mp4  {path}.gif")
    lap("files")
    clock.append(("in all", sum(seconds for _, seconds in clock)))
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in clock))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:  # whatever a user can mend
        if out_of_memory(error):
            error = "out of memory: lower --num, --size or --frames"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
