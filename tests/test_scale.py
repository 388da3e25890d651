"""lab/scale.py and its report: arms against train.py itself, budgets, stops, and the numbers of the report
against curves that have a closed form."""

import itertools
import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import train_without_pictures
from lab import report, scale, study, window
from run import Diverged, Signals, lock
from text_encoder import Prompts

FEW = (
    "never grown", "large from scratch", "large from scratch, additional compute", "doubled at 50 %",
    "doubled at 25 %, plain copies",
)  # fmt: skip


@pytest.fixture(scope="module")
def quick(tmp_path_factory, encoder_name):
    """The command with few arms of few steps -> a function (name of a folder, options, arms) that runs it and
    returns the results {file name: content}."""

    def run(name, options, arms=FEW):
        folder = root / name
        options = f"--quick --device cpu --out {folder}/out --runs {folder}/runs {options}"
        scale.main([*options.split(), "--arms", *arms])
        return {path.name: path.read_bytes() for path in sorted((folder / "out").glob("*"))}

    root = tmp_path_factory.mktemp("scale")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scale, "QUICK_NEW", f"{scale.QUICK_NEW} --text {encoder_name}")
        patch.setattr(scale, "QUICK_CLIPS", 16)
        patch.setitem(scale.PRESETS, "nano", replace(scale.PRESETS["nano"], width=32))
        patch.setattr(scale, "QUICK_UNIT", 1.3e8)  # 7 steps of the small model
        patch.setattr(scale.gc, "freeze", lambda: None)
        patch.setattr(scale, "find_revision", lambda: "abc")
        run.root = root
        yield run


@pytest.fixture(scope="module")
def whole(quick):
    """The results of two budgets, made in one go."""
    return quick("whole", "--budgets 1 2 --seeds 3")


# --------------------------------------------------------------------------------------------------------
# Training


def curve_of(run: Path):
    """The validation losses of a run of train.py -> {step: (FLOPs, loss)}."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["flops"], line["val_loss"]) for line in lines if "val_loss" in line}


@pytest.mark.parametrize("arm", ["2-never-grown-3", "2-doubled-at-25-plain-copies-3"])
def test_an_arm_is_a_run_of_train(arm, whole, tmp_path):
    """An arm that leaves the plateau to decay is a run that had the decay from its start. One that leaves it
    to grow is a run of train.py --grow from a run of train.py. They have the same bits."""
    result = json.loads(whole[f"{arm}.json"])
    rest = ["--every", "1", "--device", "cpu"]
    steps = result["curve"][-1]["step"]
    if result["base"]:
        train_without_pictures([*result["base"], *rest, "--out", str(tmp_path / "base")])
        rest += ["--from", str(tmp_path / "base")]
        steps += max(curve_of(tmp_path / "base"))
    run = train_without_pictures([*result["arguments"], *rest, "--out", str(tmp_path / "run")])
    reference = curve_of(run)
    found = {point["step"]: (point["flops"], point["val_loss"]) for point in result["curve"]}
    assert found == {step: reference[step] for step in found}
    assert max(found) == max(reference) >= 6 and len(found) >= 7
    assert result["flops"] == found[max(found)][0] and result["base_flops"] == found[0][0]
    assert result["tokens"] == steps * 4 * 8  # clips of a step, and tokens of 4 frames of 16 x 16


@pytest.fixture
def a_second_a_step(monkeypatch):
    """A clock on which a second passes with every step, in place of time.monotonic."""
    seconds = itertools.count()
    monkeypatch.setattr(scale, "time", SimpleNamespace(monotonic=lambda: next(seconds)))


def test_an_arm_continues_where_it_was_stopped(whole, quick, a_second_a_step):
    """Calls that are each shorter than any stretch of training come to the same end."""
    arms = ("never grown", "doubled at 25 %, plain copies")
    kept = set()
    for _ in range(12):
        files = quick("short", "--budgets 2 --seeds 3 --minutes 0.06", arms)
        runs = quick.root / "short" / "runs"
        kept |= {path.parent.name for path in runs.glob("*/step-*")}
    assert kept == {"plateau-4-3", *(Path(name).stem for name in files)}  # each arm was stopped
    assert len(files) == 2 and files.items() <= whole.items()
    assert not list(runs.glob("2-*"))  # the checkpoint of an arm goes when its result is there


def test_a_stopped_arm_continues_with_its_own_arguments_only(quick, a_second_a_step):
    options, arms = "--budgets 1 --seeds 3 --minutes 0.06", ["half more at 25 %"]
    for _ in range(2):  # the plateau; then the arm, which is stopped
        assert quick("half", options, arms) == {}
    with pytest.raises(ValueError, match="1-half-more-at-25-3 was begun with other --clips"):
        quick("half", f"{options} --rates 0.003 0.001 0.003", arms)


@pytest.mark.parametrize("compiler", ["none", "ended"])
def test_ctrl_c_lets_it_save(whole, quick, monkeypatch, capsys, compiler):
    """It finishes the step, if Ctrl-C has not ended the compiler that the step waits for. The next call comes
    to the same end."""
    advance = scale.advance

    def interrupted(world, stretch):
        if stretch.job.arm and stretch.step == 12:
            signal.raise_signal(signal.SIGINT)
            if compiler == "ended":
                raise RuntimeError("C++ compile error")
        advance(world, stretch)

    step = 13 if compiler == "none" else 12
    before = signal.getsignal(signal.SIGINT)
    call = f"interrupted-{compiler}", "--budgets 2 --seeds 3", ["never grown"]
    with monkeypatch.context() as patch:
        patch.setattr(Signals, "stop", Signals.stop.__wrapped__)  # this Ctrl-C is not one for the tests
        patch.setattr(scale, "advance", interrupted)
        assert quick(*call) == {}
    assert f"budget 2, never grown, seed 3: saved at step {step}; the same" in capsys.readouterr().out
    assert quick(*call) == {"2-never-grown-3.json": whole["2-never-grown-3.json"]}
    assert signal.getsignal(signal.SIGINT) == before


PAIR = ["never grown", "large from scratch"]  # of 14 and 7 steps


@pytest.fixture
def spoiled(monkeypatch):
    """Two arms train at the same time. A function (blocks, step, error): a model of so many blocks raises the
    error in this step of an arm."""
    advance = scale.advance
    monkeypatch.setitem(scale.AT_ONCE, "cpu", 2)

    def spoil(blocks, at, error):
        def spoiled_advance(world, stretch):
            if stretch.job.arm and (stretch.tr.model.config.depth, stretch.step) == (blocks, at):
                raise error
            advance(world, stretch)

        monkeypatch.setattr(scale, "advance", spoiled_advance)

    return spoil


def test_other_arms_go_on_when_one_diverges(whole, quick, spoiled, capsys):
    spoiled(8, 6, Diverged(6, math.nan))
    with pytest.raises(ValueError, match=r"^budget 2, large from scratch, seed 3: lower --rates"):
        quick("diverged", "--budgets 2 --seeds 3", PAIR)
    assert "large from scratch, seed 3: the loss or its gradient is nan at step 7" in capsys.readouterr().out
    assert [path.name for path in (quick.root / "diverged/out").iterdir()] == ["2-never-grown-3.json"]


def test_an_error_of_one_arm_saves_the_others(whole, quick, spoiled):
    spoiled(8, 6, RuntimeError("out of order"))
    with pytest.raises(RuntimeError, match="out of order"):
        quick("error", "--budgets 2 --seeds 3", PAIR)
    kept = {path.parent.name: path.name for path in (quick.root / "error/runs").glob("2-*/step-*")}
    assert kept == {"2-large-from-scratch-3": "step-6", "2-never-grown-3": "step-12"}
    spoiled(0, 0, None)
    files = quick("error", "--budgets 2 --seeds 3", PAIR)
    assert len(files) == 2 and files.items() <= whole.items()


def test_two_processes_do_not_train_the_same_arm(quick):
    """Another one has the plateau. It can have another seed."""
    with lock(quick.root / "locked/runs/plateau-4-3", ""):
        message = "another process is training in .*plateau-4-3: choose other --seeds or --runs"
        with pytest.raises(ValueError, match=message):
            quick("locked", "--budgets 1 --seeds 3", ["never grown"])
        assert len(quick("locked", "--budgets 1 --seeds 4", ["never grown"])) == 1
    assert len(quick("locked", "--budgets 1 --seeds 3", ["never grown"])) == 2


@pytest.mark.slow
def test_stops_change_nothing(whole, quick, monkeypatch, a_second_a_step):
    """The same files come out if the command is stopped again and again, if a budget is added later, and if
    two arms train at the same time."""
    monkeypatch.setitem(scale.AT_ONCE, "cpu", 2)
    counts = []
    for budgets, seconds in (("1", 2), ("1", 1), ("1", 8), ("1", 1000), ("1 2", 6), ("1 2", 1000)):
        files = quick("stopped", f"--budgets {budgets} --seeds 3 --minutes {seconds / 60}")
        counts.append(len(files))
        assert files.items() <= whole.items()  # each is whole
    assert counts[:2] == [0, 0] and 0 < counts[2] < counts[3] == len(FEW) == counts[5] / 2
    assert files == whole


def test_other_arguments_are_refused(quick, whole):
    with pytest.raises(ValueError, match=r"json was made with other --clips"):
        quick("whole", "--budgets 1 --seeds 3 --rates 0.003 0.003 0.001")
    with pytest.raises(ValueError, match=r"plateau-4-3 was begun with other --clips"):
        quick("whole", "--budgets 1 --seeds 3 --rates 0.001 0.003 0.003 --out nowhere")
    with pytest.raises(ValueError, match=r"budget of 0\.01 does not pay"):
        quick("new", "--budgets 0.01")
    with pytest.raises(ValueError, match=r"--rates is 0; it must"):
        quick("new", "--rates 0.003 0.003 0")


def test_tuning_trains_each_size_from_scratch(quick, whole, tmp_path):
    """With the rate that the arms have, the same losses come out; a second call makes what is missing."""
    folder = f"--budgets 1 --seeds 3 --tune --arms --out {tmp_path}"
    quick("tuned", folder)
    files = {path.name: path for path in (tmp_path / "rates").iterdir()}
    assert len(files) == 9
    for arm, name in (("never-grown", "4-blocks-rate-0.003"), ("large-from-scratch", "8-blocks-rate-0.003")):
        losses = [point["val_loss"] for point in json.loads(whole[f"1-{arm}-3.json"])["curve"]]
        found = json.loads(files[f"1-{name}-3.json"].read_bytes())["curve"]
        assert found[-1]["val_loss"] == losses[-1] and len(found) > 3
    for name, path in files.items():
        arguments = json.loads(path.read_bytes())["arguments"]
        assert float(arguments[arguments.index("--lr") + 1]) == float(name.split("-")[-2])
    before = {name: path.stat().st_mtime_ns for name, path in files.items()}
    files["1-6-blocks-rate-0.006-3.json"].unlink()
    quick("tuned", folder)
    changed = [name for name, path in files.items() if path.stat().st_mtime_ns != before[name]]
    assert changed == ["1-6-blocks-rate-0.006-3.json"]


def test_a_rate_that_diverges_has_no_result(quick, spoiled, tmp_path):
    spoiled(8, 2, Diverged(2, math.nan))
    quick("tuned", f"--budgets 1 --seeds 3 --tune --out {tmp_path}", arms=[])
    sizes = [int(path.name[2]) for path in (tmp_path / "rates").iterdir()]
    assert sorted(sizes) == [4, 4, 4, 6, 6, 6]


def test_features_in_memory_are_those_of_the_cache(encoder_name):
    texts = ["a red cat", "surfing", "a cat", "surfing"]
    metadata = {"text_encoder": encoder_name}
    prompts = scale.PromptsInMemory(texts, metadata, torch.device("cpu"))
    reference = Prompts(texts, metadata, 0)
    assert prompts.null == reference.null and prompts.lengths == reference.lengths
    for mine, other in zip(prompts.batch(texts), reference.batch(texts), strict=True):
        assert torch.equal(mine, other)


# --------------------------------------------------------------------------------------------------------
# Budgets


@pytest.mark.parametrize("name", scale.ARMS)
def test_budgets_add_up(name):
    """What is spent is the budget, to half a step; a fifth of it is spent in the decay."""
    costs = {4: 3.1, 6: 4.7, 8: 5.9}
    world = SimpleNamespace(unit=1000.0, step_flops=costs)
    arm = scale.ARMS[name]
    for budget in (1, 4.5, 64):
        plateau, mark, steps, decay = scale.schedule(world, arm, budget)
        wanted = 1000 * budget * (0.5 if "additional" in name else 1)
        spent = steps * costs[arm.depth]
        if arm.grown_at:
            assert abs(mark * costs[4] - arm.grown_at * wanted) <= costs[4] / 2
            spent += mark * costs[4]
        else:
            assert mark == int(0.8 * steps)
        assert abs(spent - wanted) <= costs[arm.depth] / 2
        assert decay * steps * costs[arm.depth] == pytest.approx(0.2 * wanted, rel=2 / steps)
        assert plateau == (8 if "scratch" in name else 4)


def test_points_of_a_curve():
    """On the plateau they do not depend on the number of steps. In the decay they are dense."""
    plateau = [step for step in range(100) if scale.is_point(step, math.inf, 0.0)]
    assert plateau == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96]
    points = [step for step in range(1, 101) if scale.is_point(step, 100, 0.2)]
    assert points == [*plateau[1:-1], *range(82, 101, 2)]
    assert [step for step in range(7) if scale.is_point(step, 6, 0.4)] == [0, 1, 2, 3, 4, 5, 6]


def test_clips_for_a_budget(monkeypatch, capsys):
    """No clip is seen more than ten times on average, if there is memory for so many."""
    device = SimpleNamespace(type="cpu")
    pages = {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 10**8}
    monkeypatch.setattr(scale.os, "sysconf", pages.get)
    flops = 2.4e13
    count = scale.clips_for(flops, device)
    per_clip = scale.count_flops(scale.DiT(scale.PRESETS["nano"]), [64])
    assert count == math.ceil(flops / per_clip / 10)
    pages["SC_PHYS_PAGES"] = 10**5
    monkeypatch.setattr(scale, "RESIDENT_SHARE", 0.4)
    count = 394  # 40 MB of 100 MB hold as many clips of 24,576 bytes with features of 76,800
    assert scale.clips_for(flops, device) == count
    line = f"{count} clips: the largest budget shows each {flops / per_clip / count:.1f} times"
    assert line in capsys.readouterr().out


WORLD = SimpleNamespace(
    rates={4: 0.1, 6: 0.2, 8: 0.3},
    options=[],
    new_options=[],
    unit=1000.0,
    step_flops={4: 3.1, 6: 4.7, 8: 5.9},
    runs=Path("r"),
    results=Path("o"),
)


@pytest.mark.parametrize("name", scale.ARMS)
def test_every_depth_trains_at_its_own_rate(name):
    """Before its growth an arm takes the rate of the small model."""
    job, arm = scale.arm_job(WORLD, name, 4, 0), scale.ARMS[name]
    assert float(job.arguments[job.arguments.index("--lr") + 1]) == WORLD.rates[arm.depth]
    if job.base:
        assert float(job.base[job.base.index("--lr") + 1]) == WORLD.rates[4]


def test_tuning_takes_the_smallest_budget_and_the_first_seed(monkeypatch):
    """All arms come after it."""
    seen = []
    monkeypatch.setattr(scale, "open_scale", lambda args: "scale")
    for name in ("tune", "run_budgets"):
        monkeypatch.setattr(scale, name, lambda *a, name=name: seen.append((name, *a[:-1])))
    scale.main(["--tune", "--budgets", "16", "4", "--seeds", "2", "3"])
    assert seen == [("tune", "scale", 4, 2), ("run_budgets", "scale", [16, 4], list(scale.ARMS), [2, 3])]


# --------------------------------------------------------------------------------------------------------
# The report


def test_a_report_of_what_is_there(whole, quick, tmp_path):
    """Results of the command itself, of few budgets, arms and one seed, or without *never grown*."""
    assert len(whole) == 2 * len(FEW)
    (tmp_path / "scale").mkdir()
    for name, content in whole.items():
        (tmp_path / "scale" / name).write_bytes(content)
    text = report.write_report(tmp_path, study.PARTS)
    for arm in FEW:
        assert text.count(f"| {arm} |") == (2 if arm == window.EXTRA else 3)
    for name in whole:
        if "never" in name or name.startswith("2-large"):
            (tmp_path / "scale" / name).unlink()
    assert "| doubled at 50 % |" in report.write_report(tmp_path, study.PARTS)
