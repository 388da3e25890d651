"""What happens every --every steps of a training: validation, samples, a checkpoint, a picture of the losses.

The **validation loss** is that of the EMA on held-out clips, at fixed noise and fixed timesteps, so that its
numbers can be compared from step to step and from run to run. Samples are drawn from the same noise each
time. After a growth the loss of the base and that of the grown model are printed side by side: they are equal
if the growth is function-preserving.

Left out: scores of what the samples show, which take minutes (lab/evaluate.py).
"""

import math
from pathlib import Path

import torch
from tqdm import tqdm

import parallel
from dit import DiT
from flow import STEPS, T_BINS, logit_normal, shift_of, solve, validation_loss
from machine import autocast
from run import Checkpoint, Run, history_tree, load_model
from start import Training
from text_encoder import NULL_PROMPT, Prompts
from video import save_grid, to_uint8

REFERENCE = {  # options of `python train.py` that its losses depend on
    "preset": "tiny", "data": "basic", "captions": "short", "words": "train", "clips": 16384, "text": None,
    "base": None, "frames": None, "size": None, "depth": None, "batch": 32, "steps": 6000, "lr": None,
    "warmup": 100, "decay": 0.3, "ema": 0.998,
}  # fmt: skip


def whole_model(model: DiT, device) -> DiT:
    """The model itself, or if it is sharded a complete one in every process. All processes must ask."""
    weights = {name: parallel.whole(p) for name, p in model.named_parameters()}
    if all(weights[name] is p for name, p in model.named_parameters()):
        return model
    complete = DiT(model.config).to(device).eval()
    complete.load_state_dict(weights)
    return complete


def draw_samples(tr: Training, ema: DiT, path: Path):
    """Clips of the shown prompts, from the same noise each time, as a GIF."""
    config, shown = ema.config, tr.data.shown
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(shown), 3, config.frames, config.size, config.size, generator=generator)
    prompt, null = tr.prompts.batch(shown), tr.prompts.batch([NULL_PROMPT])
    bar = tqdm(total=STEPS, desc="drawing samples", leave=False)
    with autocast(tr.device, tr.precision), bar:
        clips = solve(ema, noise.to(tr.device), prompt, null, progress=bar.update)
    path.parent.mkdir(exist_ok=True)
    save_grid(path, to_uint8(clips), shown, columns=4, fps=tr.metadata["fps"])


def validate(tr: Training, run: Run):
    """The loss of the EMA on clips that are not trained on, and samples. Raises Diverged for a loss of
    training that is not finite, ValueError for one of validation."""
    run.check_losses()
    ema = whole_model(tr.ema, tr.device)
    if not run.writer:
        return
    numbers = {"flops": tr.flops_at(run.step)}
    for name, dataset in tqdm(tr.data.held_out.items(), "validating", leave=False):
        by_t = validation_loss(ema, dataset, tr.prompts, tr.precision).tolist()
        numbers |= {name: sum(by_t) / T_BINS, f"{name}_by_t": by_t}
    if not math.isfinite(numbers["val_loss"]):
        loss = numbers["val_loss"]
        raise ValueError(f"the validation loss is {loss} after {run.step} steps: the last checkpoint is kept")
    run.record(**numbers)
    draw_samples(tr, ema, run.folder / "samples" / f"step_{run.step:06d}.gif")


def snapshot(args, tr: Training, step: int, **numbers) -> Checkpoint:
    """The training after `step` steps, its optimizer state on the CPU; `numbers` are added to the trainer
    state."""
    event = {"train": args.data, "steps": step, "captions": args.captions, "tune": tr.tune, "seed": args.seed}
    history = [*tr.metadata["history"], event]
    metadata = {**tr.metadata, "flops": tr.flops_at(step), "history": history}
    state = {**tr.trainer_state, "step": step, "lr": tr.lr.item(), **numbers}
    state["scaler"] = tr.scaler.state_dict()  # empty but in float16
    optimizer_state = {}
    for name, parameter in tr.model.named_parameters():
        if parameter in tr.optimizer.state:
            entry = tr.optimizer.state[parameter].items()
            optimizer_state[name] = {kind: parallel.whole(tensor).cpu() for kind, tensor in entry}
    model, ema = whole_model(tr.model, "cpu"), whole_model(tr.ema, "cpu")
    return Checkpoint(model, ema, optimizer_state, metadata, state)


def save(args, tr: Training, run: Run):
    """Write the checkpoint of this step. Raises Diverged instead if a loss is not finite."""
    numbers = {"losses": run.check_losses(), "seconds": run.seconds()}
    if run.total < math.inf:
        numbers |= {"total": run.total, "minutes": args.minutes}
    run.save(snapshot(args, tr, run.step, **numbers), args.keep and run.validated())


def validate_and_save(args, tr: Training, run: Run):
    """Validation, checkpoint and pictures; their time does not count as training."""
    begin = run.seconds()
    validate(tr, run)
    save(args, tr, run)
    middles = torch.special.ndtri((torch.arange(T_BINS) + 0.5) / T_BINS)
    run.plot(logit_normal(middles, shift_of(tr.clips.tensor.shape)))
    run.pause(run.seconds() - begin)


def say_what_to_expect(args):
    """Print the losses of the reference run, if this one has its options."""
    if not parallel.RANK and all(getattr(args, name) == value for name, value in REFERENCE.items()):
        print("expect a validation loss of 0.08 after 1,500 steps, 0.07 after 3,000, 0.06 after 6,000")
        print("is it learning? docs/scores.md shows more of that run")


def compare_with_base(args, tr: Training, run: Run):
    """After a growth: print the history, and the loss of base and grown model, which are equal if the growth
    is function-preserving."""
    if not args.base:
        return
    base, metadata = load_model(args.base)
    if metadata["history"] == tr.metadata["history"]:
        return
    grown = whole_model(tr.ema, tr.device)
    if parallel.RANK:
        return
    prompts = Prompts(tr.data.texts(), metadata, base.config.llm_dim, tr.device)
    dataset = tr.data.held_out["val_loss"]
    before = validation_loss(base.to(tr.device), dataset, prompts).mean().item()
    after = validation_loss(grown, dataset, tr.prompts).mean().item()
    run.record(loss_before_growth=before, loss_after_growth=after)
    print(history_tree(tr.metadata["history"]))
    print(f"float32 loss {before:.6f} before growth, {after:.6f} after")
