"""What a run leaves on disk, and what comes back from it.

A checkpoint is a directory:

    model.safetensors         the EMA weights: enough to sample, evaluate and grow. Its header holds, as JSON,
                              the config, the history of training and growth, and the text encoder's name
    train_state.safetensors   what training goes on from: weights.NAME, and for each trained parameter the
                              state of AdamW, step.NAME, exp_avg.NAME and exp_avg_sq.NAME
    train_state.json          the step, the seconds and the learning rate

It is written beside and renamed, so that a kill leaves it whole or absent. The files hold tensors and JSON
and no code, unlike a pickle, which may run anything when it is opened.
"""

import copy
import json
import math
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from dit import DiT, DiTConfig
from draw import FPS

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")  # may run anything when they are opened


def settle(path: Path):
    """Wait until a file or directory is on the disk, and not only on its way: a power cut may come."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path: Path, text: str):
    """Write a text file whole or not at all: beside it, then renamed."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    settle(new)
    new.replace(path)


def save_model(directory: Path, weights: dict[str, torch.Tensor], config: DiTConfig, **header):
    """Write `directory`/model.safetensors. `header` entries (history of growth, name of the text encoder,
    ...) are kept as JSON in the file's header, beside the config: the file alone is enough to sample."""
    metadata = {"config": json.dumps(asdict(config)), **{k: json.dumps(v) for k, v in header.items()}}
    save_file({k: v.contiguous() for k, v in weights.items()}, directory / "model.safetensors", metadata)


def find_checkpoint(path: Path | str) -> Path:
    """A run or a checkpoint directory -> the checkpoint directory. Raises FileNotFoundError if there is
    none, ValueError for a pickle."""
    if not Path(path).is_dir() and (Path(path).suffix in PICKLES or Path(path).is_file()):
        raise ValueError(
            f"{path} is not opened: a checkpoint here is a directory with model.safetensors, and pickles"
            f" ({' '.join(PICKLES)}), which may run any code, are never loaded"
        )
    for directory in (Path(path) / "checkpoint", Path(path), Path(path) / "checkpoint.old"):
        if (directory / "model.safetensors").is_file():
            return directory
    raise FileNotFoundError(
        f"there is no checkpoint in {path}: no model.safetensors there or in {path}/checkpoint"
    )


def load_model(path: Path | str) -> tuple[DiT, dict]:
    """A run or checkpoint directory -> the model with its EMA weights, in eval mode on the CPU, and the
    rest of the header, {"text_encoder", "history", ...}. Raises FileNotFoundError or ValueError."""
    file = find_checkpoint(path) / "model.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            header = {k: json.loads(v) for k, v in (opened.metadata() or {}).items()}
            weights = {k: opened.get_tensor(k) for k in list(opened.keys())}
        config = DiTConfig(**header.pop("config"))
        header = {"text_encoder": "minilm", "history": [], "flops": 0, "fps": FPS, "new": [], **header}
        check_header(header)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} is not a checkpoint of this project: {type(error).__name__} {reason}"
        ) from None
    with torch.device("meta"):  # shapes alone: nothing is allocated before the file is known to fit
        expected = {k: v.shape for k, v in DiT(config).state_dict().items()}
    wrong = [
        k for k in expected.keys() | weights.keys() if k not in weights or weights[k].shape != expected.get(k)
    ]
    if wrong:
        name = min(wrong)
        found = tuple(weights[name].shape) if name in weights else "nothing"
        wanted = tuple(expected[name]) if name in expected else "nothing"
        raise ValueError(
            f"{file} does not fit its own config: {name} is {found}, not {wanted} ({len(wrong)} differ)"
        )
    model = DiT(config)
    model.load_state_dict(weights)
    return model.eval(), header


def check_number(value, name):
    """Raise ValueError unless `value` is a number from 0 on, and no infinite one."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {str(value)[:80]}, which is no number from 0 on")


def check_header(header):
    """Raise ValueError, TypeError, KeyError or AttributeError if what others read of a header is not what
    they would understand: a file may come from anywhere."""
    for name in ("flops", "fps"):
        check_number(header[name], name)
    if not 0.01 <= header["fps"] <= 1000:
        raise ValueError(f"fps is {header['fps']}")
    for name in ("text_encoder", "llm", "llm_features"):
        if not isinstance(header.get(name, ""), str):
            raise ValueError(f"{name} is no text")
    if not (isinstance(header["new"], list) and all(isinstance(name, str) for name in header["new"])):
        raise ValueError("new is no list of names")
    for event in header["history"]:
        if "grow" not in event:
            if type(event["steps"]) is not int or not 0 <= event["steps"] < 2**40:
                raise ValueError(f"steps is {str(event['steps'])[:80]}")
            if not isinstance(event["train"], str) or not isinstance(event["captions"], str):
                raise ValueError("what was trained on has no name")
    tree(header["history"])


class Checkpoint(NamedTuple):
    """A training run at a step."""

    model: DiT  # what the optimiser moves
    ema: DiT  # what is sampled
    moments: dict[
        str, dict[str, torch.Tensor]
    ]  # parameter -> step, exp_avg, exp_avg_sq; none before its first step
    header: dict  # of model.safetensors, without the config
    state: dict  # train_state.json; empty if there is nothing but model.safetensors


def save_checkpoint(directory: Path, checkpoint: Checkpoint):
    """Write `directory` whole or not at all: beside it, then renamed. A kill between the two renames
    leaves `directory`.old, which `find_checkpoint` takes. Raises OSError if the disk is full; then what was
    there before is there still."""
    new, old = (directory.with_name(directory.name + end) for end in (".new", ".old"))
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write_checkpoint(new, checkpoint)
    except (SafetensorError, OSError) as error:  # the first hides an OSError
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{directory} could not be written: {error}") from None
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    settle(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(new: Path, checkpoint: Checkpoint):
    """The files of a checkpoint, in a directory of their own."""
    save_model(new, checkpoint.ema.state_dict(), checkpoint.ema.config, **checkpoint.header)
    if checkpoint.state:
        tensors = {f"weights.{name}": p.detach() for name, p in checkpoint.model.named_parameters()}
        for name, moments in checkpoint.moments.items():
            tensors |= {f"{kind}.{name}": tensor for kind, tensor in moments.items()}
        save_file({k: v.contiguous() for k, v in tensors.items()}, new / "train_state.safetensors")
        (new / "train_state.json").write_text(json.dumps(checkpoint.state, indent=1))
    for file in (*new.iterdir(), new):
        settle(file)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """A run or checkpoint directory -> all of it, on the CPU. Without a training state the weights are
    those of the EMA. Raises FileNotFoundError or ValueError."""
    directory = find_checkpoint(path)
    ema, header = load_model(directory)
    model, file = copy.deepcopy(ema), directory / "train_state.safetensors"
    if not file.exists():
        return Checkpoint(model, ema, {}, header, {})
    try:
        parameters = {}  # name -> weights and moments
        for key, tensor in load_file(file).items():
            kind, name = key.split(".", 1)
            parameters.setdefault(name, {})[kind] = tensor
        model.load_state_dict({name: entry.pop("weights") for name, entry in parameters.items()})
        moments = {name: entry for name, entry in parameters.items() if entry}
        for name, entry in moments.items():
            shape = model.get_parameter(name).shape
            kinds = [(entry[kind].shape, entry[kind].dtype) for kind in ("step", "exp_avg", "exp_avg_sq")]
            if kinds != [(s, torch.float32) for s in ((), shape, shape)]:
                raise ValueError(f"the moments of {name} have another shape or type")
        state = json.loads(file.with_suffix(".json").read_text())
        for name in ("step", "seconds", "look_seconds", "flops_before", "lr_before", "lr", "peak_at_128"):
            check_number(state[name], name)
        if (
            type(state["step"]) is not int
            or state["step"] >= 2**40
            or not all(type(loss) is float for loss in state.get("losses", ()))
        ):
            raise ValueError("step or losses are no numbers")
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not fit its model: {type(error).__name__} {reason}") from None
    return Checkpoint(model, ema, moments, header, state)


def tree(history: list[dict]) -> str:
    """The history of a checkpoint, one line for each training and growth; each growth is a branch."""
    lines, indent = [], ""
    for event in history:
        if "grow" in event:
            entries = [f"{key} {a} -> {b}" for key, (a, b) in event["changed"].items()]
            told = {"grow", "changed", *event["changed"]}  # llm_dim is an option and a size
            entries += [f"{k} {v}" for k, v in event.items() if k not in told and v is not None]
            lines.append(f"{indent}└─ {event['grow']}: {', '.join(entries)}")
            indent += "   "
        else:
            what = f"{event['steps']} steps on {event['train']}, {event['captions']} captions"
            lines.append(f"{indent}trained {what}, tuning {event['tune']}, seed {event['seed']}")
    return "\n".join(lines)


def plot_losses(path: Path, records, times):
    """The picture of a run: training loss and validation loss over steps (also on what the base had learned),
    and validation loss over time t; `times` are those that the validation losses by t stand for."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    val = [(r["step"], r["val_loss"], r["val_loss_by_t"]) for r in records if "val_loss" in r]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    left.plot(*zip(*train, strict=True), alpha=0.6, label="training")
    left.plot([v[0] for v in val], [v[1] for v in val], "o-", label="validation, of the EMA")
    if old := [(r["step"], r["old_val_loss"]) for r in records if "old_val_loss" in r]:
        left.plot(*zip(*old, strict=True), "o-", label="validation, on what the base had learned")
    left.set(xlabel="step", ylabel="velocity loss", yscale="log")
    left.legend()
    for i, (step, _, by_t) in enumerate(val):
        shade = 0.15 + 0.75 * (i + 1) / len(val)
        right.plot(times, by_t, color=str(1 - shade), label=f"step {step}")
    right.set(xlabel="t (0 = noise, 1 = clean)", ylabel="validation loss", yscale="log")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
