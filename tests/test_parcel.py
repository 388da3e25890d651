"""lab/parcel.py and lab/on_gpu.sh: what is measured on a borrowed machine comes home."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from conftest import run_training
from lab import parcel
from lab.study import PARTS, make_parser
from run import load_model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def parcelled(tmp_path_factory, encoder_name):
    """A run of two steps, a result, and the parcel of both."""
    folder = tmp_path_factory.mktemp("parcel")
    run = run_training(folder / "runs" / "grown", encoder_name, "--steps 2 --every 2")
    (run / "samples").mkdir(exist_ok=True)
    for step in (0, 2):
        (run / "samples" / f"step_{step:06d}.gif").write_text(f"step {step}")
    result = folder / "results" / "scale" / "arm-0.json"
    result.parent.mkdir(parents=True)
    result.write_text('{"seed": 0}')
    (folder / "results" / "scale" / "evaluation.gif").write_text("eight clips")
    parcel.pack(folder / "out", folder / "results", [run])
    return run, folder / "out"


def test_a_parcel_is_put_into_its_places(parcelled, tmp_path):
    run, out = parcelled
    for folder in ("results", "pretrained", "assets"):
        (tmp_path / folder).mkdir()
    (tmp_path / "results" / "reader.json").write_text("stays")
    (tmp_path / "results" / "pretrained").mkdir()
    for name in ("evaluation.json", "evaluation.gif"):
        (tmp_path / "results" / "pretrained" / name).write_text("of the model before")
    written = parcel.take(out, tmp_path)
    assert all(file.is_file() for file in written)
    assert json.loads((tmp_path / "results" / "scale" / "arm-0.json").read_text()) == {"seed": 0}
    assert (tmp_path / "results" / "pretrained" / "grown-metrics.jsonl").is_file()
    assert (tmp_path / "results" / "reader.json").read_text() == "stays"
    assert not list((tmp_path / "results" / "pretrained").glob("evaluation.*"))
    assert (tmp_path / "assets" / "samples.gif").read_text() == "step 2"
    assert (tmp_path / "results" / "scale" / "evaluation.gif").read_text() == "eight clips"
    (model, metadata), (home, metadata_home) = load_model(run), load_model(tmp_path / "pretrained")
    assert metadata == metadata_home and model.config == home.config
    for name, weight in model.state_dict().items():
        assert torch.equal(home.state_dict()[name], weight.bfloat16().float())


def test_nothing_else_is_taken(parcelled, tmp_path):
    """A name that leads out of the folder is refused, and so is a folder without a parcel."""
    with pytest.raises(FileNotFoundError, match="writes one"):
        parcel.take(tmp_path)
    with tarfile.open(tmp_path / "results.tar.gz", "w:gz") as tar:
        entry = tarfile.TarInfo("../outside.json")
        entry.size = 2
        tar.addfile(entry, io.BytesIO(b"{}"))
    with pytest.raises(ValueError, match=r"is damaged: .*outside"):
        parcel.take(tmp_path, tmp_path / "home")
    assert not (tmp_path / "home" / "outside.json").exists()


@pytest.mark.parametrize("share", [0, 0.3, 0.9])
def test_half_a_parcel_is_refused_in_one_line(parcelled, tmp_path, share):
    content = (parcelled[1] / "results.tar.gz").read_bytes()
    (tmp_path / "results.tar.gz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="is damaged"):
        parcel.take(tmp_path, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_a_parcel_stays_until_the_next_one_is_whole(parcelled, tmp_path, monkeypatch):
    shutil.copytree(parcelled[1], tmp_path / "out")
    before = (tmp_path / "out" / "results.tar.gz").read_bytes()
    with pytest.raises(FileNotFoundError):
        parcel.pack(tmp_path / "out", tmp_path, [tmp_path / "no-run"])
    assert (tmp_path / "out" / "results.tar.gz").read_bytes() == before


@pytest.fixture
def recorded(tmp_path):
    """A function that runs lab/on_gpu.sh with another `python`: it writes its arguments down, runs the lines
    of bash it is given, and does nothing else -> (the exit status, [the arguments of each call])."""

    def run_script(lines, out="out"):
        python, calls = tmp_path / "python", tmp_path / "calls"
        note = f"(IFS='|'; echo \"$*\") >> {calls}\n[[ $1 == -c ]] && echo 540"
        python.write_text(f"#!/bin/bash\n{note}\n{lines}\nexit 0\n")
        python.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
        script = [str(REPOSITORY / "lab" / "on_gpu.sh"), str(tmp_path / out)]
        command = ["env", "--default-signal=INT,HUP", "bash", *script]  # what runs the tests may ignore them
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        return done.returncode, [call.split("|") for call in calls.read_text().splitlines()]

    return run_script


def test_on_gpu_continues_from_nothing_that_was_stopped(recorded):
    """A training that is asked to stop ends well. Then nothing grows from it, and a parcel is packed."""
    status, calls = recorded("[[ $1 == train.py ]] && kill -TERM $PPID")
    assert status == 130
    begun = next(i for i, call in enumerate(calls) if call[0] == "train.py")
    assert len(calls) == begun + 2 and calls[-1][:2] == ["-m", "lab.parcel"]


CHILD = """
import os, signal, sys, time
from pathlib import Path

asked = []

def stop(number, frame):
    asked.append(number)
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_DFL)

for each in (signal.SIGINT, signal.SIGTERM):
    signal.signal(each, stop)
os.killpg(int(sys.argv[2]), getattr(signal, sys.argv[1]))
for _ in range(100):
    time.sleep(0.1)
    if asked:
        time.sleep(1)  # it saves
        Path("saved").touch()
        break
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("program", ["$2 == lab.study", "$2 == lab.scale", "$1 == train.py"])
def test_on_gpu_lets_save_what_is_stopped(recorded, tmp_path, program, number):
    """Ctrl-C in a terminal, and the end of that terminal, reach a whole group of processes. What is trained
    gets one signal, since a second one would end it."""
    (tmp_path / "child.py").write_text(CHILD)
    status, calls = recorded(
        f"[[ {program} ]] && mkdir asked && exec {sys.executable} child.py {number} $PPID"
    )
    assert (tmp_path / "saved").exists()
    assert status == 130 and calls[-1][:2] == ["-m", "lab.parcel"]


def test_on_gpu_takes_a_folder_with_spaces(recorded, tmp_path):
    calls = recorded('[[ $1 == train.py ]] && mkdir -p "${@: -1}"', out="my out")[1]
    assert ["-m", "lab.parcel", str(tmp_path / "my out"), "--results", "results"] in calls


def test_on_gpu_trains_all_arms_of_the_table(recorded):
    """What fails in one part stops no other part."""
    status, calls = recorded("""
        [[ $2 == lab.study || $2 == lab.scale ]] && exit 1
        [[ $1 == train.py ]] && mkdir -p "${@: -1}"
        [[ $2 == lab.actors ]] && mkdir -p runs/gpu/actors && touch runs/gpu/actors/pretrained.json
    """)
    studied = [make_parser().parse_args(call[2:]) for call in calls if call[1] == "lab.study"]
    found = [(args.parts, arm, seed) for args in studied for arm in args.arms for seed in args.seeds]
    rates = [(["gpu-rates"], arm, 0) for arm in PARTS["gpu-rates"]]
    table = [(["gpu-table"], arm, seed) for arm in PARTS["gpu-table"] for seed in range(3)]
    assert status == 0 and sorted(found) == sorted(rates + table)
    assert [call[1] for call in calls[-3:]] == ["lab.evaluate", "lab.actors", "lab.parcel"]


@pytest.mark.slow
def test_on_gpu_runs_at_tiny_sizes_on_a_cpu(tmp_path):
    """All parts, with the real encoders; a second call makes nothing again."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "lab/on_gpu.sh", str(tmp_path), "--quick", "--minutes", "60"]

    def call():
        environment = {**os.environ, "PATH": path}
        return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)

    done = call()
    assert done.returncode == 0, done.stderr[-2000:]
    assert {file.name for file in tmp_path.iterdir()} >= {
        "results.tar.gz",
        "model.safetensors",
        "samples.gif",
    }
    curve = json.loads((tmp_path / "results" / "actors" / "pretrained.json").read_text())
    runs = [Path(point["checkpoint"]).parent.name for point in curve["points"]]
    assert runs == ["pretrained-base"] * 3 + ["pretrained"] * 3
    with tarfile.open(tmp_path / "results.tar.gz") as tar:
        names = tar.getnames()
    assert any(name.startswith("scale-on-a-gpu/") for name in names) and "pretrained/evaluation.json" in names
    again = call()
    assert again.returncode == 0 and "train.py" not in again.stdout
    assert subprocess.run([*command[:3], "--nonsense"], cwd=REPOSITORY, capture_output=True).returncode == 2
