"""What a run leaves on disk: checkpoints, metrics, pictures; how it is stopped and resumed.

A checkpoint is a directory:

    model.safetensors         the EMA weights: enough to sample, evaluate and grow. Its header holds, as JSON,
                              the config, the history of training and growth, and the encoders' names
    train_state.safetensors   what training continues from: weights.NAME, and for each trained parameter the
                              optimizer state of AdamW: step.NAME, exp_avg.NAME and exp_avg_sq.NAME
    train_state.json          the step, the learning rate, the FLOPs of the base, and the like

A new one is first written under another name and then renamed, so after a kill it is complete or does not
exist, but is never half written. The files hold tensors and JSON and no code, unlike a pickle, which may run
anything when it is opened. A header may come from anywhere, so `load_model` checks every entry that is used.

A run is a directory too: checkpoint/, metrics.jsonl, loss.png, samples/step_N.gif, args.json, lock; with
--keep the EMA weights of every validation, step_N/; and evaluation.json, from lab/evaluate.py. `Run` is such
a directory while it is trained. One process trains in it at a time. Asked to stop (Ctrl-C, SIGTERM), it
finishes the step and saves.

Left out: training states of earlier steps, uploads, loggers other than a file of JSON lines.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import filelock
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from tqdm import tqdm

from dit import DiT, DiTConfig
from machine import fsync, save_tensors

PRETRAINED = Path(__file__).with_name("pretrained")  # the included model
PAGE = "docs/real_models.md says which grow and how to train"
FILES = {  # suffix of a file that is no checkpoint -> what to do
    ".safetensors": "name the folder that it is in. A single-file model becomes a folder by diffusers'"
    " from_single_file(FILE).save_pretrained(FOLDER); see docs/real_models.md",
    ".gguf": "GGUF is quantized: take the original weights",
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")  # may run any code when they are opened
FOREIGN = {  # a file in a folder that is no checkpoint, as a pattern -> what the folder is
    "model_index.json": f"it is a pipeline of diffusers; with transformer/config.json it can grow; {PAGE}",
    "transformer/config.json": "did you mean its folder transformer?",
    "config.json": f"it is a model of another library; {PAGE}",
    "snapshots/*": "it is a cache of the Hub: name its folder snapshots/...",
    "*.gguf": FILES[".gguf"],
    "*.bin": "pickles, which may run any code, are never loaded",
}
LOG_EVERY = 10  # steps per line of metrics.jsonl, and per synchronization with the device
DEFAULTS = {"text_encoder": "minilm", "history": [], "flops": 0, "fps": 8, "new": []}
METADATA = ("config", *DEFAULTS, "llm", "llm_features")  # entries of a header; others are ignored

# --------------------------------------------------------------------------------------------------------
# Files


def write_atomically(path: Path, text: str):
    """Write a text file whole or not at all: beside its place, then renamed. Several processes may write the
    same one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
        new = Path(temporary, "new")
        new.write_text(text)
        fsync(new)
        new.replace(path)


@contextlib.contextmanager
def lock(folder: Path, instead: str):
    """Let no other process train in `folder`. Raises ValueError if one does, and says what to do instead;
    OSError where there are no locks, as in the file systems of some networks."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        acquired = filelock.FileLock(folder / "lock").acquire(timeout=0)
    except filelock.Timeout:
        raise ValueError(f"another process is training in {folder}: {instead}") from None
    except OSError as error:
        raise OSError(f"{folder} cannot be locked ({error.strerror}): {instead}, elsewhere") from None
    with acquired:
        yield


# --------------------------------------------------------------------------------------------------------
# Models


def save_model(directory: Path, weights: dict[str, torch.Tensor], config: DiTConfig, **metadata):
    """Write `directory`/model.safetensors, with the config and `metadata` (history, encoders' names, ...) as
    JSON in its header: the file alone is enough to sample."""
    header = {"format": "pt", "config": json.dumps(asdict(config))}  # other tools ask for the format
    for name, value in metadata.items():
        header[name] = json.dumps(value)
    save_tensors(directory / "model.safetensors", weights, header)


def find_checkpoint(path: Path | str) -> Path:
    """A run or a checkpoint directory -> the checkpoint directory. Raises FileNotFoundError if there is none,
    ValueError for a pickle."""
    path = Path(path)
    if path.is_file() and path.suffix in FILES:
        raise ValueError(f"{path} is a file, and a checkpoint is a directory: {FILES[path.suffix]}")
    if path.is_file() or (path.suffix in PICKLES and not path.is_dir()):
        raise ValueError(
            f"{path} is not opened: a checkpoint is a directory with model.safetensors, and pickles"
            f" ({' '.join(PICKLES)}), which may run any code, are never loaded"
        )
    for directory in (path / "checkpoint", path, path / "checkpoint.old"):
        if (directory / "model.safetensors").is_file():
            return directory
    raise FileNotFoundError(f"there is no checkpoint in {path}: {foreign(path) or 'no model.safetensors'}")


def foreign(path: Path) -> str:
    """What a path is that may be no checkpoint of this project, or nothing if that cannot be told."""
    if not path.exists():
        return "no such folder, and a model on the Hub has to be downloaded first"
    for file, meaning in FOREIGN.items():
        if any(path.glob(file)):
            return meaning
    return ""


def runs_folder(quick: bool) -> str:
    """Where runs without --out go. Those of --quick learn nothing: they stay out of the way of real ones."""
    return "runs/quick" if quick else "runs"


def newest_checkpoint(root: Path = Path("runs")) -> Path:
    """The checkpoint that was written last in any run right below `root` (--quick runs lie deeper); else the
    included model. Raises FileNotFoundError if there is neither."""
    files = [*root.glob("*/checkpoint/model.safetensors"), *root.glob("*/checkpoint.old/model.safetensors")]
    if files:
        return max(files, key=lambda file: file.stat().st_mtime).parent
    if (PRETRAINED / "model.safetensors").is_file():
        return PRETRAINED
    raise FileNotFoundError("there is no trained model: run `python train.py` first, or name one with --from")


def read_config(entries: dict) -> DiTConfig:
    """The config of a header, also of older ones -> DiTConfig. Raises ValueError or TypeError."""
    entries = dict(entries)
    if entries.pop("llm_refiner", 0):
        raise ValueError("it has a refiner, which this version cannot run: commit c2dc483 can")
    return DiTConfig(**entries)


def check_number(value, name: str):
    """Raise ValueError unless `value` is a finite number from 0 on."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is {str(value)[:80]}; it must be a finite number from 0 on")


def check_step(value, name: str):
    """Raise ValueError unless `value` is a number of steps."""
    if type(value) is not int or not 0 <= value < 2**40:
        raise ValueError(f"{name} is {str(value)[:80]}; it must be a number of steps")


def check_metadata(metadata: dict):
    """Raise ValueError, TypeError, KeyError or AttributeError if an entry is not what its readers expect."""
    check_number(metadata["flops"], "flops")
    check_number(metadata["fps"], "fps")
    if not 0.01 <= metadata["fps"] <= 1000:
        raise ValueError(f"fps is {metadata['fps']}; it must be between 0.01 and 1000")
    for name in ("text_encoder", "llm", "llm_features"):
        if not isinstance(metadata.get(name, ""), str):
            raise ValueError(f"{name} must be a string")
    new = metadata["new"]
    if not isinstance(new, list) or not all(isinstance(name, str) for name in new):
        raise ValueError("new must be a list of parameter names")
    for event in metadata["history"]:
        if "grow" not in event:
            check_step(event["steps"], "steps")
            if not isinstance(event["train"], str) or event["captions"] not in ("short", "detailed", "both"):
                raise ValueError("the data of a training in the history, or its captions, are unknown")
        elif "train" in event or "steps" in event:
            raise ValueError("an event of the history is a growth and a training at once")
    history_tree(metadata["history"])


def check_weights(weights: dict, config: DiTConfig):
    """Raise ValueError unless the weights are those of a model of `config`."""
    with torch.device("meta"):  # shapes alone: nothing is allocated before the file is known to fit
        expected = {name: weight.shape for name, weight in DiT(config).state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        found = tuple(weights[name].shape) if name in weights else "absent"
        wanted = tuple(expected[name]) if name in expected else "absent"
        if found != wanted:
            raise ValueError(f"{name} is {found}, and by the config it should be {wanted}")


def load_model(path: Path | str) -> tuple[DiT, dict]:
    """A run or checkpoint directory -> the model with its EMA weights, in eval mode on the CPU, and the rest
    of the header, {"text_encoder", "history", ...}. Raises FileNotFoundError or ValueError."""
    file = find_checkpoint(path) / "model.safetensors"
    try:
        with safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in list(opened.keys())}
        metadata = {name: json.loads(header[name]) for name in METADATA if name in header}
        config = read_config(metadata.pop("config"))
        metadata = {**DEFAULTS, **metadata}
        check_metadata(metadata)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = type(error).__name__
        hint = foreign(file.parent)
        reason = f"{reason} ({hint})" if hint else reason
        raise ValueError(f"{file} is not a checkpoint of this project: {kind} {reason}") from None
    try:
        check_weights(weights, config)
    except ValueError as error:
        raise ValueError(f"{file} does not fit its own config: {error}") from None
    model = DiT(config)
    model.load_state_dict(weights)
    return model.eval(), metadata


def last_training(history: list[dict]) -> dict | None:
    """The last event of a history that is a training; None if there is none."""
    return next((event for event in reversed(history) if "train" in event), None)


def history_tree(history: list[dict]) -> str:
    """The history of a checkpoint, a line for each training and growth; each growth begins a branch."""
    lines, indent = [], ""
    for event in history:
        if "grow" not in event:
            what = f"{event['steps']} steps on {event['train']}, {event['captions']} captions"
            lines.append(f"{indent}trained {what}, tuning {event['tune']}, seed {event['seed']}")
            continue
        entries = [f"{key} {a} -> {b}" for key, (a, b) in event["changed"].items()]
        for key, value in event.items():
            if key not in ("grow", "changed", *event["changed"]) and value is not None:
                entries.append(f"{key} {value}")
        lines.append(f"{indent}└─ {event['grow']}: {', '.join(entries)}")
        indent += "   "
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------------------
# Checkpoints


class Checkpoint(NamedTuple):
    """A training run at a step."""

    model: DiT  # what the optimizer moves
    ema: DiT  # what is sampled
    optimizer_state: dict[str, dict[str, torch.Tensor]]  # parameter -> step, exp_avg, exp_avg_sq
    metadata: dict  # header of model.safetensors, without the config
    trainer_state: dict  # train_state.json; empty if there is nothing but model.safetensors


def save_checkpoint(directory: Path, checkpoint: Checkpoint):
    """Write `directory` whole or not at all. A kill between the two renames leaves `directory`.old, which
    `find_checkpoint` takes. Raises OSError if the disk is full; what was there before stays."""
    new = directory.with_name(directory.name + ".new")
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        write_checkpoint(new, checkpoint)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        raise OSError(f"{directory} could not be written: {error}") from None
    if directory.exists():
        shutil.rmtree(old, ignore_errors=True)
        directory.rename(old)
    new.rename(directory)
    fsync(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def write_checkpoint(directory: Path, checkpoint: Checkpoint):
    """The files of a checkpoint, in a directory of their own."""
    save_model(directory, checkpoint.ema.state_dict(), checkpoint.ema.config, **checkpoint.metadata)
    if checkpoint.trainer_state:
        tensors = {f"weights.{name}": p.detach() for name, p in checkpoint.model.named_parameters()}
        for name, entry in checkpoint.optimizer_state.items():
            for kind, tensor in entry.items():
                tensors[f"{kind}.{name}"] = tensor
        save_tensors(directory / "train_state.safetensors", tensors)
        (directory / "train_state.json").write_text(json.dumps(checkpoint.trainer_state, indent=1))
    for file in (*directory.iterdir(), directory):
        fsync(file)


def load_checkpoint(path: Path | str) -> Checkpoint:
    """A run or checkpoint directory -> all of it, on the CPU. Without a training state the weights are those
    of the EMA. Raises FileNotFoundError or ValueError, also if a training replaces it in the meantime."""
    directory = find_checkpoint(path)
    before = directory.stat()
    ema, metadata = load_model(directory)
    model = copy.deepcopy(ema)
    file = directory / "train_state.safetensors"
    optimizer_state, trainer_state = {}, {}
    try:
        if file.exists():
            optimizer_state = read_train_tensors(file, model)
            trainer_state = read_trainer_state(file.with_suffix(".json"))
    except (SafetensorError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} does not fit its model: {type(error).__name__} {reason}") from None
    if not directory.exists() or not os.path.samestat(before, directory.stat()):
        raise ValueError(f"{directory} was replaced by a training while it was read: try again")
    return Checkpoint(model, ema, optimizer_state, metadata, trainer_state)


def read_train_tensors(file: Path, model: DiT) -> dict[str, dict[str, torch.Tensor]]:
    """Load the trained weights into `model` -> the optimizer state by parameter. Raises ValueError or others
    for tensors that do not fit."""
    weights, optimizer_state = {}, {}
    for key, tensor in load_file(file).items():
        kind, name = key.split(".", 1)
        if kind == "weights":
            weights[name] = tensor
        else:
            optimizer_state.setdefault(name, {})[kind] = tensor.clone()  # not mapped: the file will go
    model.load_state_dict(weights)
    for name, entry in optimizer_state.items():
        shape = model.get_parameter(name).shape
        for kind, wanted in (("step", ()), ("exp_avg", shape), ("exp_avg_sq", shape)):
            if entry[kind].shape != wanted or entry[kind].dtype != torch.float32:
                raise ValueError(f"the optimizer state of {name} has another shape or type")
    return optimizer_state


def read_trainer_state(file: Path) -> dict:
    """train_state.json, checked. Raises ValueError, KeyError or TypeError."""
    state = json.loads(file.read_text())
    if "peak_at_128" in state:  # the name in older checkpoints
        state["base_lr"] = state.pop("peak_at_128")
    check_step(state["step"], "step")
    for name in ("seconds", "flops_before", "lr_before", "lr", "base_lr"):
        check_number(state[name], name)
    check_step(state.get("total", 0), "total")
    if not all(type(loss) is float for loss in state.get("losses", ())):
        raise ValueError("losses must be a list of numbers")
    if not all(type(name) is str for name in state.get("skipped", ())):
        raise ValueError("skipped must be a list of names")
    return state


# --------------------------------------------------------------------------------------------------------
# A run while it is trained


def read_options(folder: Path | str, parser) -> dict:
    """args.json of a run: the options of train.py, whose argparse parser is given. Raises FileNotFoundError
    if there is none, ValueError if it is not as train.py has written it."""
    file = Path(folder) / "args.json"
    if not file.is_file():
        raise FileNotFoundError(f"there is no run to resume in {folder}")
    try:
        options = dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{file} is not what train.py has written: it is no JSON object") from None
    for action in parser._actions:
        value = options.get(action.dest)
        kind = action.type or (str if action.nargs is None else bool)
        kinds = (int, float) if kind is float else (kind,)
        empty = value is None and action.dest not in ("data", "captions")
        if not empty and (type(value) not in kinds or (action.choices and value not in action.choices)):
            raise ValueError(f"{file} is not what train.py has written: {action.dest} is {value!r}")
    return options


def option_name(name: str) -> str:
    """The option of train.py whose value is called `name` in args.json."""
    return "--" + {"base": "from"}.get(name, name.replace("_", "-"))


class Diverged(ValueError):
    """The loss or its gradient was not finite at `step`."""

    def __init__(self, step: int, loss: float):
        super().__init__(f"the loss or its gradient is {loss} at step {step + 1}")
        self.step = step


class Signals:
    """Ctrl-C and SIGTERM as a wish to save and stop."""

    def __init__(self):
        self.asked = False  # whether this process was asked to stop
        self.handlers = {}  # of signals, as they were before

    def listen(self):
        """From here on the first signal is a wish."""
        if threading.current_thread() is threading.main_thread():  # no other thread may ask for signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.stop)

    def stop(self, number, frame):
        """The signal handler: note the wish. A second signal acts as usual."""
        self.asked = True
        self.restore()

    def restore(self):
        """Let signals act as they did before."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


class Run:
    """The directory of a run while it is trained: `with Run(folder) as run:`.

    `writer`: whether this process writes (one of several does). `agree` makes a number the largest of those
    of all processes, `mean` averages a tensor over them. Raises ValueError if the folder holds a run already
    and `resume` is not given, or if another process trains in it.
    """

    def __init__(self, folder: Path | str, resume=False, writer=True, agree=lambda x: x, mean=lambda x: x):
        self.folder, self.writer = Path(folder), writer
        self.agree, self.mean = agree, mean
        self.resume = resume
        self.records: list[dict] = []  # the lines of metrics.jsonl
        self.losses: list[torch.Tensor] = []  # of the steps since the last line, on the training device
        self.step = 0  # steps done
        self.total = math.inf  # steps to do; --minutes fixes it after the first ones
        self.signals = Signals()
        self.stopped = False  # whether the run was stopped before its end; the same in all processes
        self.started = time.perf_counter()
        self.last_log = 0, 0.0  # step and seconds
        self.pause_seconds = 0.0  # what the last validation took

    def __enter__(self):
        self.is_new = not self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        existing = [name for name in ("checkpoint", "checkpoint.old") if (self.folder / name).exists()]
        if existing and not self.resume:
            begun = (self.folder / "args.json").is_file()  # else it comes from grow.py
            how = "give --resume, or" if begun else f"give --from {self.folder}, and"
            raise ValueError(f"{self.folder} holds a run already: {how} choose another --out")
        self.locks = contextlib.ExitStack()
        if self.writer:
            self.locks.enter_context(lock(self.folder, "choose another --out"))
        return self

    def __exit__(self, *_):
        self.signals.restore()
        if self.writer and self.is_new and self.is_empty():
            shutil.rmtree(self.folder, ignore_errors=True)  # a start that failed: others may take the name
        self.locks.close()

    def is_empty(self) -> bool:
        """Whether the folder holds nothing, or only the lock."""
        return all(path.name == "lock" for path in self.folder.iterdir())

    def seconds(self) -> float:
        """How long the run has been trained, earlier parts included."""
        return time.perf_counter() - self.started

    # -- metrics

    @property
    def metrics(self) -> Path:
        """The file of JSON lines."""
        return self.folder / "metrics.jsonl"

    def begin(self, args: dict, trainer_state: dict):
        """Write args.json, and take up metrics, pending losses and clock where a resumed run stopped. From
        here on the first signal lets the run save and stop. Raises ValueError if --minutes are over."""
        self.step = self.first = trainer_state["step"]
        self.total = args["steps"] or math.inf
        if trainer_state.get("minutes") == args["minutes"] and not args["steps"]:
            self.total = trainer_state.get("total", math.inf)  # what these minutes have come to
        self.check_longer(args, trainer_state)
        self.started -= trainer_state["seconds"]
        self.losses = [torch.tensor(loss) for loss in trainer_state.get("losses", ())]
        self.last_log = self.step, self.seconds()
        lines = self.metrics.read_text().splitlines(keepends=True) if self.resume else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be cut off
        self.records = [record for record in records if record["step"] <= self.step]
        if self.writer:
            write_atomically(self.folder / "args.json", json.dumps(args, indent=1))
            write_atomically(self.metrics, "".join(json.dumps(r) + "\n" for r in self.records))
        self.signals.listen()

    def check_longer(self, args: dict, trainer_state: dict):
        """Raise ValueError if a run is to end after minutes that are over; print a note if it had begun its
        decay and is to be longer."""
        seconds = trainer_state["seconds"]
        if args["minutes"] and self.total == math.inf and 60 * args["minutes"] <= seconds:
            raise ValueError(f"{self.folder} has {seconds / 60:.1f} minutes already: --minutes must be more")
        before = trainer_state.get("total", math.inf)
        if self.writer and self.total > before and self.step > (1 - args["decay"]) * before:
            print(f"note: the learning rate had fallen, and jumps up; --from {self.folder} warms up")

    def record(self, **numbers):
        """Append a line to metrics.jsonl."""
        self.records.append({"step": self.step, **numbers})
        if self.writer:
            with self.metrics.open("a") as file:
                file.write(json.dumps(self.records[-1]) + "\n")

    def validated(self) -> bool:
        """Whether the present step has been validated."""
        return any(record["step"] == self.step and "val_loss" in record for record in self.records)

    def steps(self):
        """Step numbers from the present one on, with a progress bar, until `total` steps are done or the run
        is asked to stop."""
        known = self.total if self.total < math.inf else None
        bar = tqdm(None, "training", known, unit="step", initial=self.step, disable=not self.writer)
        with bar as self.bar:
            while self.step < self.total:
                if self.agree(self.signals.asked):
                    self.stopped = True
                    return
                self.bar.total = None if self.total == math.inf else self.total
                yield self.step

    def log(self, loss: torch.Tensor, batch: int, **numbers):
        """Count a step with its loss (a tensor, which is not looked at). Every LOG_EVERY steps the device is
        waited for, and the mean loss and the speed are written down. Raises Diverged."""
        self.losses.append(loss)
        self.step += 1
        self.bar.update()
        if self.step % LOG_EVERY:
            return
        mean = sum(self.check_losses()) / len(self.losses)
        self.losses.clear()
        seconds = self.seconds()
        speed = (self.step - self.last_log[0]) * batch / (seconds - self.last_log[1])
        self.last_log = self.step, seconds
        self.record(loss=mean, **numbers, seconds=seconds, samples_per_second=speed)
        self.bar.set_postfix_str(f"loss {mean:.4f}, {speed:.0f} clips/s")

    def check_losses(self) -> list[float]:
        """The losses since the last line of metrics, as numbers. Raises Diverged if one is not finite."""
        if not self.losses:
            return []
        device = self.losses[-1].device
        losses = torch.stack([loss.to(device) for loss in self.losses])
        losses = self.mean(losses).tolist()
        for i, loss in enumerate(losses):
            if not math.isfinite(loss):
                raise Diverged(self.step - len(losses) + i, loss)
        return losses

    def pause(self, seconds: float):
        """Do not count the last `seconds` as training in the speed."""
        self.pause_seconds = seconds
        step, begin = self.last_log
        self.last_log = step, begin + seconds

    def save(self, checkpoint: Checkpoint, keep: bool):
        """Write the checkpoint in the place of the last one; with `keep`, also its EMA weights in a place of
        their own, step_N, which is a checkpoint without a training state."""
        if self.writer:
            fsync(self.metrics)
            if keep:  # first: a run that continues from the checkpoint would not make it again
                kept = self.folder / f"step_{self.step:06d}"
                save_checkpoint(kept, checkpoint._replace(trainer_state={}))
            save_checkpoint(self.folder / "checkpoint", checkpoint)

    def plot(self, times):
        """Draw loss.png; `times` are the timesteps that the validation losses by timestep stand for."""
        if self.writer and any("loss" in record for record in self.records):
            plot_losses(self.folder / "loss.png", self.records, times)

    def summary(self) -> str:
        """What a run has come to."""
        if self.stopped:
            of = f" of {self.total}" if self.total < math.inf else ""
            return f"{self.folder}: stopped and saved at step {self.step}{of}; continue with --resume"
        last = next(record for record in reversed(self.records) if "val_loss" in record)
        line = f"{self.folder}: {self.step} steps, {self.seconds() / 60:.1f} minutes"
        line += f", validation loss {last['val_loss']:.4f}"
        if "old_val_loss" in last:
            line += f", on the old data {last['old_val_loss']:.4f}"
        then = f'python sample.py "YOUR PROMPT" --from {self.folder}'
        return f"{line}\nthe model is in {self.folder / 'checkpoint'}; next: {then}"


def plot_losses(path: Path, records: list[dict], times):
    """The picture of a run: training and validation loss over steps, and validation loss over timesteps."""
    from matplotlib.figure import Figure  # slow to import

    curves = {"loss": "training", "val_loss": "validation (EMA)", "old_val_loss": "validation, old data"}
    figure = Figure(figsize=(10, 4), layout="tight")
    left, right = figure.subplots(1, 2)
    for key, label in curves.items():
        points = [(record["step"], record[key]) for record in records if key in record]
        if points:
            left.plot(*zip(*points, strict=True), "-" if key == "loss" else "o-", label=label)
    left.set(xlabel="step", ylabel="velocity loss", yscale="log")
    left.legend()
    validated = [record for record in records if "val_loss_by_t" in record]
    for i, record in enumerate(validated):
        grey = 0.85 - 0.75 * (i + 1) / len(validated)
        right.plot(times, record["val_loss_by_t"], color=str(grey), label=f"step {record['step']}")
    right.set(xlabel="t (0 = noise, 1 = clean)", ylabel="validation loss", yscale="log")
    right.legend(fontsize=7)
    figure.savefig(path, dpi=100)
