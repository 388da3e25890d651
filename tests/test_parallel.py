"""Several processes, data parallel or sharded, in parts or not: the losses are those of one process.

The fast test starts two processes by itself; the slow ones use torchrun, as a user would, and kill processes.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import parallel
from conftest import CHILDREN, brief, numbers, run_training, train_without_pictures
from run import load_model

HERE = Path(__file__).parent.parent
OPTIONS = "--depth 2 --batch 6 --every 10 --decay 0 --precision fp32"


# --------------------------------------------------------------------------------------------------------
# One process


def test_shares_of_a_batch(monkeypatch):
    batch = torch.arange(6)
    monkeypatch.setattr(parallel, "WORLD", 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "RANK", rank)
        shares.append(parallel.my_share(batch).tolist())
    assert shares == [[0, 1], [2, 3], [4, 5]]


def test_what_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "WORLD", 3)
    with pytest.raises(ValueError, match="--batch 8 cannot be shared by 3 processes"):
        parallel.start(8, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="there are 2 GPUs for 3 processes"):
        parallel.start(9, "auto")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # of more on several machines
    with pytest.raises(ValueError, match="there are 2 GPUs for 4 processes"):
        parallel.start(9, "auto")


def test_which_errors_say_that_a_process_is_gone(monkeypatch):
    lost = RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")
    assert not parallel.peer_lost(lost)  # there is no other process
    monkeypatch.setattr(parallel, "WORLD", 2)
    assert parallel.peer_lost(lost)
    assert not parallel.peer_lost(ValueError("--data 'bookstore' is neither a set nor a folder"))
    assert not parallel.peer_lost(RuntimeError("shapes differ"))


def test_one_process_is_alone():
    values = torch.tensor([1.0, 2.0])
    assert parallel.agree(3) == 3 and torch.equal(parallel.mean(values), values)
    assert parallel.whole(values) is values and parallel.slice_like(values, values) is values
    model = torch.nn.Linear(2, 2)
    assert parallel.distribute(model, None, False, torch.device("cpu")) is model


# --------------------------------------------------------------------------------------------------------
# Several processes


def several(count, argv, program="train.py", **how):
    """`torchrun --nproc-per-node COUNT train.py` with the words `argv`, begun; `how` goes to Popen."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.Popen([*torchrun, program, *argv], cwd=HERE, text=True, stderr=subprocess.PIPE, **how)


def finish(process, fails=False):
    """Wait for the end -> what it said to stderr."""
    said = process.communicate(timeout=300)[1]
    assert (process.returncode != 0) == fails, said
    return said


def assert_same_up_to_rounding(run, other):
    """Metrics and EMA weights of two runs agree, and one left the same files as the other."""
    assert len(numbers(run)) == len(numbers(other)) > 0
    for mine, theirs in zip(numbers(run), numbers(other), strict=True):
        assert mine.keys() == theirs.keys() and mine["flops"] == theirs["flops"]
        for key in mine.keys() & {"loss", "val_loss"}:
            assert abs(mine[key] - theirs[key]) < 1e-4, (mine, theirs)
    a, b = load_model(run)[0], load_model(other)[0]
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-3)
    assert files_of(run) == files_of(other)  # process 0 alone writes


def files_of(run):
    """The names of a run's files but the pictures, which trainings of this process do not make."""
    names = [str(file.relative_to(run)) for file in run.rglob("*")]
    return sorted(name for name in names if name != "loss.png" and not name.startswith("samples"))


def one_of_two(rank, port, argv):
    """What each of two processes does that train together without torchrun."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    parallel.RANK, parallel.WORLD = rank, 2
    train_without_pictures(argv)


def train_with_two(argv):
    """Two processes train as `argv` says."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [CHILDREN.Process(target=one_of_two, args=(rank, port, argv)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        child.kill()  # if it waits for ever
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


@pytest.fixture(scope="module")
def one(tmp_path_factory, encoder_name):
    """A run of one process, 20 steps."""
    return run_training(tmp_path_factory.mktemp("runs") / "one", encoder_name, OPTIONS)


@pytest.mark.parametrize("how", ["--accumulate 2", "--shard"])
def test_two_processes_are_one(tmp_path, encoder_name, one, how):
    train_with_two(brief(tmp_path / "two", encoder_name, f"{OPTIONS} {how}"))
    assert_same_up_to_rounding(tmp_path / "two", one)


def test_slices_of_a_grown_model(tmp_path, encoder_name, one):
    """Before the first step the grown model is put together in process 0, to compare it with the base."""
    options = f"--from {one} --grow depth --add 1 --steps 2 --batch 6"
    train_with_two(brief(tmp_path / "two", encoder_name, f"{options} --shard"))
    first = numbers(tmp_path / "two")[0]
    assert first["loss_before_growth"] == pytest.approx(first["loss_after_growth"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, how, count_later",
    [(2, "", 3), (3, "--accumulate 2", 2), (2, "--shard", 1), (3, "", 2)],
)
def test_torchrun_with_any_number_of_processes(tmp_path, encoder_name, count, how, count_later):
    """A run is begun by some and resumed by more or fewer, sharded or not; it has the losses of one."""
    one, run = tmp_path / "one", tmp_path / "run"
    run_training(one, encoder_name, f"{OPTIONS} --steps 30")
    finish(several(count, brief(run, encoder_name, f"{OPTIONS} {how}")))
    shard = "--shard" if count == 3 else ""
    finish(several(count_later, f"--resume --steps 30 --out {run} {shard}".split()))
    assert_same_up_to_rounding(run, one)


MANY_ENDS = """
import sys
import torch
sys.path.insert(0, {here!r})
import parallel

parallel.start(4, "cpu")
sys.setswitchinterval(60)
network = parallel.distribute(torch.nn.Linear(64, 64), None, False, torch.device("cpu"))
for _ in range(3):
    network(torch.randn(4, 64)).sum().backward()
    parallel.agree(0)
parallel.finish()
"""


@pytest.mark.slow
def test_several_processes_end_well(tmp_path):
    """Gloo's threads rarely get at the interpreter. With Python's own end about half were aborted."""
    program = tmp_path / "program.py"
    program.write_text(MANY_ENDS.format(here=str(HERE)))
    for _ in range(3):
        finish(several(4, [], program=str(program)))


def children_by_rank(process):
    """-> {rank: process id} of the children of torchrun."""
    children = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                children[int(variable[5:])] = int(child)
    return children


def begin_endless(out, encoder_name):
    """Two processes that train for long -> torchrun, after the first losses."""
    argv = brief(out, encoder_name, "--every 5 --steps 100000")
    process = several(2, argv, start_new_session=True)
    metrics = out / "metrics.jsonl"
    while not metrics.is_file() or '"loss"' not in metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all(tmp_path, encoder_name, rank):
    process = begin_endless(tmp_path, encoder_name)
    children = children_by_rank(process)
    os.kill(children[rank], signal.SIGKILL)
    said = finish(process, fails=True)
    assert f"error: process {1 - rank}: another process of this run ended; use --resume" in said
    assert not any(Path(f"/proc/{child}").exists() for child in children.values())
    step = json.loads((tmp_path / "checkpoint" / "train_state.json").read_text())["step"]
    finish(several(1, f"--resume --steps {step + 3} --out {tmp_path}".split()))


@pytest.mark.slow
def test_processes_stop_together(tmp_path, encoder_name):
    """One of them is asked to stop: all do after the same step, and the run can be resumed."""
    process = begin_endless(tmp_path, encoder_name)
    os.kill(children_by_rank(process)[1], signal.SIGTERM)
    finish(process)
    step = json.loads((tmp_path / "checkpoint" / "train_state.json").read_text())["step"]
    assert step >= 10
    finish(several(2, f"--resume --steps {step + 3} --out {tmp_path}".split()))
    assert load_model(tmp_path)[1]["history"][0]["steps"] == step + 3
