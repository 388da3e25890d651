"""lab/study.py and lab/report.py: the controls, budgets in FLOPs, runs that continue, and the numbers of the
report against curves that were made up for it."""

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

from conftest import tiny_llm
from lab import report, study, tables, verdicts
from run import Signals, load_checkpoint
from text_encoder import NULL_PROMPT, Prompts
from train import parse_arguments, update_ema

RESULTS = Path(study.__file__).parents[1] / "results"


# --------------------------------------------------------------------------------------------------------
# Controls


def control_prompts(tmp_path, encoder_name, llm_dim):
    """Four texts as the right, the wrong and the same prompts -> three Prompts."""
    metadata = {"text_encoder": encoder_name, "llm": tiny_llm(tmp_path), "llm_features": "last"}
    texts = ["a red cat", "a cat surfing", "red", "surfing cat"]
    return [kind(texts, metadata, llm_dim) for kind in (Prompts, study.WrongPrompts, study.SamePrompts)]


def test_the_wrong_prompts_are_those_of_other_captions(tmp_path, encoder_name):
    right, wrong, _ = control_prompts(tmp_path, encoder_name, 16)
    rows = torch.arange(5)
    text, mask, llm, llm_mask = right.gather(rows)
    same_text, same_mask, other, other_mask = wrong.gather(rows)
    assert torch.equal(text, same_text) and torch.equal(mask, same_mask)
    assert wrong.lengths == right.lengths and wrong.null == right.null
    sources = []
    for row in range(5):
        length = int(other_mask[row].sum())
        for source in range(5):
            if llm_mask[source].sum() == length and torch.equal(other[row, :length], llm[source, :length]):
                sources.append((row, source))
    assert [row for row, _ in sources] == list(range(5))  # each reads exactly one
    assert sorted(source for _, source in sources) == list(range(5))  # and each caption is read by one
    for row, source in sources:
        assert (row == source) == (row == right.null)
    shuffled = wrong.gather(rows, rows.flip(0))  # captions that are hidden from one encoder alone
    assert torch.equal(shuffled[2][:, : other.shape[1]], other.flip(0))
    assert len(wrong.batch([NULL_PROMPT])) == 4


def test_the_same_prompts_are_those_of_the_base_padded(tmp_path, encoder_name):
    _, _, same = control_prompts(tmp_path, encoder_name, 20)
    text, mask, again, again_mask = same.batch(["a red cat", NULL_PROMPT, "red"])
    assert torch.equal(again_mask, mask) and again.shape == (*text.shape[:2], 20)
    assert torch.equal(again[..., :16], text) and not again[..., 16:].any() and text.any()
    assert len(study.SamePrompts(["red"], {"text_encoder": encoder_name}, 0).batch(["red"])) == 2


# --------------------------------------------------------------------------------------------------------
# Arms


def test_every_arm_is_a_command_of_train(tmp_path):
    """All options exist and fit together, and each arm continues from an arm before it."""
    for part, arms in study.PARTS.items():
        seen = []
        for arm, (base, _) in arms.items():
            for quick in (False, True):
                options, budget = study.split_budget(study.arm_arguments(part, arm, 1, quick))
                args = parse_arguments([*options, *(["--from", str(tmp_path)] if base else [])])
                assert args.seed == 1 and (budget is None) == (args.steps not in (1200, 6000))
            assert base is None or base in seen
            seen.append(arm)


def test_the_table_takes_the_best_learning_rate(tmp_path):
    """Of those that were tried for the kind without an LLM, on one seed."""
    here = study.Study(tmp_path, tmp_path, None, "")
    with pytest.raises(FileNotFoundError, match=r"0\.0015-0\.json is not there: first run --parts gpu-rates"):
        study.arguments_of(here, "gpu-table", "expansion + llm", 3)
    for rate, loss in ((0.0015, 0.3), (0.003, 0.1), (0.006, 0.2)):
        for seed, more in ((0, 0), (1, 0.3 - 2 * loss)):  # the other seed does not count
            curve = [{"step": 9, "flops": 2, "val_loss": loss + more}]
            write_result(tmp_path, "gpu-rates", {"arm": f"expansion, {rate}", "seed": seed, "curve": curve})
    expected = [*study.arm_arguments("gpu-table", "expansion + llm", 3), "--lr", "0.003"]
    assert study.arguments_of(here, "gpu-table", "expansion + llm", 3) == expected
    assert "--lr" not in study.arguments_of(here, "gpu-table", "base", 3)
    assert "--lr" not in study.arguments_of(replace(here, quick=True), "gpu-table", "expansion", 3)


def test_names_of_files_hold_no_signs():
    path = study.arm_path(Path("results"), "timing", "insert at 25 %, x 4", 2)
    assert path == Path("results/timing/insert-at-25-x-4-2")


def test_steps_for_a_budget():
    assert study.steps_for(1000, 0, 10) == 100
    assert study.steps_for(1000, 500, 10) == 50
    assert study.steps_for(1004, 500, 10) == 50  # the closest
    with pytest.raises(ValueError, match="less than the base has spent"):
        study.steps_for(500, 500, 10)


@pytest.fixture
def small_study(tmp_path, monkeypatch, encoder_name):
    """A study with two arms of a few steps that are paid from a budget of FLOPs."""
    tiny = "--quick --clips 16 --batch 2 --every 100 --decay 0 --device cpu "
    new = f"{tiny}--frames 4 --size 16 --text {encoder_name} "
    arms = {
        "base": study.Arm(None, new + "--flops 1e9"),
        "insert": study.Arm("base", tiny + "--data basic --grow depth --flops 2e9"),
    }
    monkeypatch.setattr(study, "PARTS", {"timing": arms})
    return study.Study(tmp_path / "runs", tmp_path / "results", None, "abc")


def test_arms_spend_their_budget(small_study, capsys, monkeypatch):
    result = study.run_arm(small_study, "timing", "insert", 0)
    spent = {}
    for arm, budget in (("base", 1e9), ("insert", 2e9)):
        run = load_checkpoint(study.arm_path(small_study.runs, "timing", arm, 0))
        spent[arm] = run.metadata["flops"]
        steps = run.trainer_state["step"]
        per_step = (spent[arm] - spent.get("base", 0) * (arm == "insert")) / steps
        assert steps > 2 and abs(spent[arm] - budget) <= per_step / 2
    assert result["flops"] == spent["insert"] and result["arm"] == "insert" and result["revision"] == "abc"
    curve = verdicts.loss_curve(result, "val_loss")
    assert curve[0][:2] == (0, spent["base"]) and curve[-1][1] == spent["insert"]
    file = small_study.results / "timing" / "insert-0.json"
    assert json.loads(file.read_text()) == result
    # What is there is not done again.
    monkeypatch.setattr(study, "train", None)
    assert study.run_arm(small_study, "timing", "insert", 0) == result
    file.unlink()
    assert study.run_arm(small_study, "timing", "insert", 0) == result
    # Other arguments are refused.
    study.PARTS["timing"]["insert"] = study.Arm("base", study.PARTS["timing"]["insert"].options + " --add 1")
    with pytest.raises(ValueError, match="has other arguments"):
        study.run_arm(small_study, "timing", "insert", 0)
    file.unlink()
    with pytest.raises(ValueError, match="was begun with another --add"):
        study.run_arm(small_study, "timing", "insert", 0)


def test_one_process_trains_an_arm_and_others_wait(tmp_path, monkeypatch):
    """The base of the table is that of its learning rates, whose processes it would meet."""
    here, trained = study.Study(tmp_path, tmp_path, None, "", quick=True), []

    def note(run, *rest):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(run.with_name(f"{run.name}.lock")).acquire(timeout=0)
        trained.append(str(run.relative_to(tmp_path)))

    monkeypatch.setattr(study, "planned_steps", lambda *a: 5)
    monkeypatch.setattr(study, "train_until", note)
    for part in ("rates", "table"):
        study.train_arm(here, part, "base", 2)
    study.train_arm(here, "table", "lora", 2)
    study.train_arm(here, "growth", "base", 2)
    assert trained == ["rates/base-2", "rates/base-2", "rates/base-2", "table/lora-2", "growth/base-2"]
    filelock.FileLock(tmp_path / "rates" / "base-2.lock").acquire(timeout=0)


@pytest.mark.slow
def test_an_arm_that_was_stopped_ends_as_one_that_was_not(small_study, tmp_path, monkeypatch):
    whole = load_checkpoint(study.train_arm(small_study, "timing", "base", 0))
    calls = []

    def interrupted(ema, model, step, decay):
        """Ctrl-C in the third step of the first training."""
        update_ema(ema, model, step, decay)
        calls.append(step)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("train.update_ema", interrupted)
    monkeypatch.setattr(Signals, "stop", Signals.stop.__wrapped__)  # this Ctrl-C is not one for the tests
    again = study.Study(tmp_path / "again", tmp_path / "again", None, "abc")
    with pytest.raises(KeyboardInterrupt):
        study.train_arm(again, "timing", "base", 0)
    resumed = load_checkpoint(study.train_arm(again, "timing", "base", 0))
    assert calls == list(range(whole.trainer_state["step"])) and len(calls) > 3
    assert resumed.trainer_state["step"] == whole.trainer_state["step"]
    for name, weight in whole.ema.state_dict().items():
        assert torch.equal(weight, resumed.ema.state_dict()[name]), name


@pytest.mark.slow
def test_the_quick_study_runs_every_kind_of_arm(tmp_path, monkeypatch, encoder_name, capsys):
    """Growth, LoRA, LLM and controls, from nothing to the report, and the command that only reports."""
    llm = tiny_llm(tmp_path / "llm")
    parts = {}
    for part, arms in study.PARTS.items():
        parts[part] = {}
        for arm, (base, options) in arms.items():
            options += f" --text {encoder_name}" if base is None else ""
            options += f" --llm {llm}" if "llm" in options.split("--grow ")[-1].split()[0] else ""
            parts[part][arm] = study.Arm(base, options)
    monkeypatch.setattr(study, "PARTS", parts)
    arms = ["lora", "insert", "insert + llm", "wrong captions, nothing hidden", "minilm twice"]
    folders = ["--runs", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    study.main(["--quick", "--parts", "growth", "language", "--arms", "base", *arms, *folders])
    assert "| minilm twice | " in capsys.readouterr().out
    done = sorted(path.name for path in (tmp_path / "results").glob("*/*.json"))
    assert len(done) == 7 and "wrong-captions-nothing-hidden-0.json" in done  # two of them are bases
    assert (tmp_path / "results" / "gallery.gif").stat().st_size > 1000
    text = (tmp_path / "results" / "README.md").read_bytes()
    monkeypatch.setattr(study, "train", None)
    study.main(["--report", *folders])
    assert (tmp_path / "results" / "README.md").read_bytes() == text
    (tmp_path / "results" / "README.md").unlink()
    study.main(["--quick", "--no-report", "--parts", "growth", "--arms", "base", *folders])
    assert not (tmp_path / "results" / "README.md").exists()
    with pytest.raises(ValueError, match="no arm is called 'x'"):
        study.main(["--quick", "--arms", "x"])


# --------------------------------------------------------------------------------------------------------
# The report


def test_the_report_in_the_repository_is_that_of_its_files(tmp_path):
    """results/README.md follows from the JSON files, to the byte; so do the pictures, on one machine."""
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    text = report.write_report(folder, study.PARTS)
    assert text == (RESULTS / "README.md").read_text()
    names = "loss.png", "forgetting.png", "timing.png", "longer.png"
    pictures = [(folder / name).read_bytes() for name in names]
    report.write_report(folder, study.PARTS)
    assert pictures == [(folder / name).read_bytes() for name in names]
    here = study.Study(folder, folder, None, "")
    for part, arms in study.PARTS.items():  # the results are those of the arms as they are now
        for arm in arms:
            for seed in range(3):
                path = study.arm_path(folder, part, arm, seed)
                file = path.with_name(path.name + ".json")
                if file.is_file():
                    result = json.loads(file.read_text())
                    assert result["arguments"] == study.arguments_of(here, part, arm, seed)


def test_one_table_writer():
    assert tables.markdown_table(["a", "b"], [["1", "2"], ["3", ""]]) == (
        "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"
    )
    table = tables.score_table({"seen": {"subject": 0.5, "all": 0.25, "place": 1}})
    assert (
        table.splitlines()[0]
        == "|  | subject | colour | motion | background | change | count | relation | all |"
    )
    assert table.splitlines()[2] == "| seen | 0.500 |  |  |  |  |  |  | 0.250 |"


def write_result(folder, part, result):
    """Put a result where the study puts it."""
    file = study.result_file(study.Study(folder, folder, None, ""), part, result["arm"], result["seed"])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result))


def language_result(arm, seed, shift):
    """A result of part language whose scores rise by `shift`."""
    right = {"subject": 0.5 + shift, "colour": 0.7, "all": 0.1, "place": 0.9}
    scores = {"seen": right, "held-out words": right, "val_loss": [1]}
    return {"arm": arm, "seed": seed, "revision": "abc", "machine": "m", "scores": scores}


def test_the_table_of_learning_rates(tmp_path):
    """The last loss of each kind and rate, over its seeds; the base learns other clips. One seed is enough,
    so nothing is under way."""
    parts = {"rates": {"base": (None, ""), "lora, 0.003": ("base", "")}, "longer": {}}
    for arm in parts["rates"]:
        for seed, loss in ((0, 0.2), (1, 0.4)):
            curve = [{"step": 0, "flops": 1, "val_loss": 0.9}, {"step": 9, "flops": 2, "val_loss": loss}]
            result = {"arm": arm, "seed": seed, "arguments": [], "curve": curve}
            write_result(tmp_path, "rates", result | {"revision": "abc", "machine": "m"})
    found = {part: report.read_part(tmp_path / part, part, arms) for part, arms in parts.items()}
    table = report.rates_section(found["rates"])[1]
    assert "| lora, 0.003 | 0.3000 ± 0.1414 |" in table and "base" not in table
    found |= {"growth": {}, "timing": {}, "table": {}, "gpu-table": {}, "language": {}}
    assert report.heading([{"seed": 0}], found, parts, {}) == ["Mean ± standard deviation over seeds 0."]


def test_parts_that_score_nothing_need_no_proof(tmp_path, monkeypatch):
    """Nor do they draw the gallery, which shows seed 0 of part growth."""
    done = []
    monkeypatch.setattr(study, "run_arm", lambda *arm: None)
    monkeypatch.setattr(study, "prove", lambda reader: done.append("proof") or {})
    monkeypatch.setattr(study, "score_table", str)
    monkeypatch.setattr(study, "write_gallery", lambda here, seed: done.append(seed))
    here = study.Study(tmp_path, tmp_path, None, "")
    study.run_study(here, ["timing", "longer", "rates"], None, [1])
    assert done == [] and not (tmp_path / "reader.json").exists()
    study.run_study(here, ["timing", "growth"], None, [1])
    assert done == ["proof", 0]


def test_after_the_deadline_no_arm_is_begun(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(study, "run_arm", lambda *arm: begun.append(arm))
    here = study.Study(tmp_path, tmp_path, None, "", quick=True)
    study.run_study(here, ["table"], None, [0], deadline=0)
    assert not begun
    study.run_study(here, ["table"], None, [0])
    assert [arm for _, _, arm, _ in begun] == list(study.TABLE)


def test_the_report_of_part_language(tmp_path):
    for seed, shift in enumerate((0.1, 0.2, 0.3)):
        write_result(tmp_path, "language", language_result("base encoder", seed, shift))
        write_result(tmp_path, "language", language_result("llm mean", seed, 2 * shift))
    write_result(tmp_path, "language", language_result("llm mean, refiner", 0, 9))  # an arm of the past
    text = report.write_report(tmp_path, study.PARTS)
    assert text == report.write_report(tmp_path, study.PARTS) == (tmp_path / "README.md").read_text()
    assert "over seeds 0, 1, 2. Under way: 6 of " in text
    assert "| base encoder | 0.700 ± 0.050 | 0.700 ± 0.050 |" in text  # (0.5 + 0.2 + 0.7) / 2
    assert "| llm mean | 0.800 ± 0.100 | 0.800 ± 0.100 |" in text
    assert "| llm mean | 0.100 ± 0.050 | 0.100 ± 0.050 |\n" in text  # the gain, seed by seed
    assert "| llm mean, refiner |" not in text
    assert "| The language model helps with words that were in no training caption. | open |\n" in text
    gain = "*llm mean* over *base encoder*, held-out words: 0.1000 ± 0.0500 (holds)"
    assert f"in no training caption.** Open. {gain}.\n" in text  # two of three arms are not there
    write_result(
        tmp_path, "language", language_result("llm last", 7, 0.1)
    )  # the base encoder has no such seed
    text = report.write_report(tmp_path, study.PARTS)
    assert "| llm last | 0.650 | 0.650 |" in text and "| llm last |  |  |\n" in text
    with pytest.raises(FileNotFoundError, match="no results"):
        report.write_report(tmp_path / "nothing", study.PARTS)


def growth_result(arm, seed, losses, per_step, before=0.0, forgotten=0.0):
    """A result with a loss on `rich` for every 100 steps. The training losses in between are the same, but
    for one bad batch at step 10."""
    curve = []
    for i, loss in enumerate(losses):
        spent = {"step": 100 * i, "flops": before + 100 * i * per_step}
        curve.append({**spent, "val_loss": loss, "old_val_loss": 1 + forgotten})
        if i == len(losses) - 1:
            break
        for step in range(10, 101, 10):
            bad = 1 if step == 10 and i == 0 else 0
            curve.append({"step": 100 * i + step, "loss": loss + bad})
    one = {"subject": 0.5, "flicker": 0.9, "all": 0.1}
    several = {"subject": 0.5, "relation": losses[-1]}
    scores = {"seen": one, "several actors": several, "long": several}
    scores |= {"val_loss": [1 + forgotten] * 8, "rich_loss": [losses[-1]] * 8}
    result = {"arm": arm, "seed": seed, "arguments": ["--data", "rich"], "revision": "abc", "machine": "m"}
    return result | {"scores": scores, "curve": curve}


def test_savings_in_flops():
    large = growth_result("large from scratch", 0, [4, 3, 2], per_step=1)
    grown = growth_result("insert at 25 %", 0, [3, 2.5, 1.5], per_step=0.5, before=50)
    # It comes down to 2 half-way between steps 100 and 200: 50 + 75 FLOPs instead of 200.
    assert verdicts.savings({0: grown}, {0: large, 1: large}) == [pytest.approx(200 / 125)]
    assert verdicts.savings({0: growth_result("", 0, [3, 2.5], 1)}, {0: large}) == [None]
    assert verdicts.first_reached([(5, 1.9), (6, 2.1), (7, 1.8)], 2.0) == 5
    assert verdicts.first_reached([(0, 3.0), (1, 2.5)], 2.0) is None
    assert verdicts.first_reached([(0, 3.0), (1, 2.5), (2, 1.5)], 2.0) == 1.5
    assert verdicts.loss_at(verdicts.loss_curve(large, "val_loss"), 150) == 2.5


def test_spike_and_mixing():
    """Both arms have the same bad batch at step 10, which cancels."""
    large = growth_result("large from scratch", 0, [4, 3, 2], per_step=1)
    grown = growth_result("insert at 25 %", 0, [3, 2.5, 1.5], per_step=0.5, before=50)
    better = growth_result("insert", 0, [2.9, 1.9, 1.9], 1)
    assert verdicts.spike(grown, large) == pytest.approx(-1) and verdicts.spike(better, better) == 0
    assert verdicts.steps_to_mix(better, grown) == 10 and verdicts.steps_to_mix(large, grown) is None
    assert verdicts.steps_to_mix(growth_result("insert", 0, [2.9, 3, 3], 1), grown) is None  # only at first
    without = {**large, "curve": [entry for entry in large["curve"] if "loss" not in entry]}
    assert verdicts.spike(without, large) is None and verdicts.steps_to_mix(without, large) is None


def test_the_life_of_a_model_begins_at_its_growth():
    """*never grown* has been the small models before it; a grown arm has not."""
    large = growth_result("large from scratch", 0, [4, 3, 2], per_step=1)
    small = growth_result("_small 80 %", 0, [3, 1.5], 0.5)
    by_arm = {"_small 80 %": {0: small}, "never grown": {0: growth_result("", 0, [1.4], 0.5, 50)}}
    starts = {"_small 80 %": None, "never grown": "_small 80 %"}
    life = verdicts.since_growth("never grown", 0, by_arm, starts)
    assert verdicts.savings({0: life}, {0: large}) == [pytest.approx(200 / (50 * 2 / 3))]
    by_arm["never grown"][0]["arguments"] = ["--grow", "depth"]
    assert verdicts.since_growth("never grown", 0, by_arm, starts) == by_arm["never grown"][0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.1, 0.11, 0.12], "holds"),
        ([-0.1, -0.11, -0.12], "contradicted"),
        ([0.1], "open"),
        ([0.1, -0.01, 0.1], "open"),
        ([0.001, 0.3, 0.001], "open"),
        ([0.045, 0.2, 0.05], "open"),  # its mean is 1.9 standard errors
        ([0.0, 0.0, 0.0], "open"),
    ],
)
def test_verdicts(values, expected):
    assert verdicts.verdict(values) == expected


def curve(*points):
    return {"curve": [{"step": s, "flops": s, "val_loss": loss, "old_val_loss": loss} for s, loss in points]}


def test_gains_at_equal_steps():
    """The curve of the longer run is read, between its points, at the last step of the shorter one."""
    mine, other = curve((0, 1.0), (100, 1.2)), curve((0, 1.0), (200, 1.8))
    assert verdicts.gain(mine, other, "basic, equal steps") == pytest.approx(0.2)


def test_one_contradiction_decides_a_claim(monkeypatch):
    """Others that are open, or that were not measured, do not."""
    monkeypatch.setattr(verdicts, "CLAIMS", "C.\n    a > b: last\n    x > b: last\n    c > b: last")
    found = {"a": {0: curve((9, 3.0)), 1: curve((9, 3.1))}, "b": {0: curve((9, 2.0)), 1: curve((9, 2.0))}}
    assert [j.verdict for j in verdicts.judge(found)] == ["contradicted"]


def test_each_arm_is_scored_on_prompts_of_its_own_style():
    low, high = {"subject": 0.1, "all": 1}, {"subject": 0.9, "all": 1}
    a, b = {"scores": {"long": high, "short": low}}, {"scores": {"long": low, "short": low}}
    assert verdicts.gain(a, b, "long against short") == pytest.approx(0.8)


def test_an_arm_that_is_below_from_the_first_window_on_mixes_at_once():
    losses = [(10 * i, 2.0 if i < 4 else 0.5) for i in range(10)]
    mine = {"curve": [{"step": s, "loss": loss} for s, loss in losses]}
    other = {"curve": [{"step": s, "loss": 1.5} for s, _ in losses]}
    assert verdicts.steps_to_mix(mine, other, window=10) == 0


def test_a_section_names_its_commit_and_whether_it_was_changed():
    found = {"a": {0: {"revision": "0123456789abcdef+", "machine": "m"}}}
    assert report.provenance(found) == "Measured at 0123456789+ on m."


def test_a_table_of_benchmarks_has_a_column_for_each_arm():
    def result(x):
        return {0: {"scores": {"seen": {}, "several actors": {"relation": x}}}}

    table = report.benchmark_table({"base": result(0.1), "insert": result(0.2)}, ("base", "lora", "insert"))
    assert "| T2V-CompBench spatial relationships | 0.100 | 0.200 |" in table


def test_the_papers_table_says_what_is_learned_and_forgotten(tmp_path):
    arms = {"base": (9.0, 0.0), "dense continuation": (2.0, 0.3), "expansion": (1.9, 0.4)}
    for arm, (loss, forgotten) in arms.items():
        for seed in range(3):
            result = growth_result(arm, seed, [3, loss - 0.01 * seed * (arm == "expansion")], 1, 0, forgotten)
            rate = [] if arm == "base" else ["--lr", "0.003"]
            write_result(tmp_path, "table", result | {"arguments": [*result["arguments"], *rate]})
    text = report.write_report(tmp_path, study.PARTS)
    assert "| base |  | 100 | 9.0000 ± 0.0000 |  | 1.0000 ± 0.0000 |  |\n" in text
    row = "| expansion | 0.003 | 100 | 1.8900 ± 0.0100 | 0.1100 ± 0.0100 (holds) | 1.4000 ± 0.0000 |"
    assert row + " -0.1000 ± 0.0000 (contradicted) |\n" in text
    assert "| benchmark | base | dense continuation | expansion |\n" in text


@pytest.fixture
def growth_report(tmp_path):
    """The text of a report on made-up results of all parts on growth."""
    arms = [("base", [3, 3], 0.0), ("continued", [3, 2.6, 2.4, 2.3], 0.3), ("insert", [3, 2.5, 2.2], 0.2)]
    arms.append(("large from scratch", [9, 4, 3, 2.2], 0.0))
    for seed in range(3):
        for arm, losses, forgotten in arms:
            losses = [loss + 0.01 * seed for loss in losses]
            forgotten += 0.01 * seed if arm == "insert" else 0
            write_result(tmp_path, "growth", growth_result(arm, seed, losses, 1, 100, forgotten))
        timing = {"insert at 25 %": [3, 2.5, 2.1], "insert at 50 %": [3, 2.8, 2.95], "never grown": [3, 2.9]}
        for arm, losses in timing.items():
            write_result(tmp_path, "timing", growth_result(arm, seed, losses, 0.5, 50))
        for arm, losses in (("insert at 50 %", [3, 2.8 + 0.01 * seed]), ("never grown", [3, 2.9])):
            write_result(tmp_path, "longer", growth_result(arm, seed, losses, 0.5, 50))
    return report.write_report(tmp_path, study.PARTS)


def test_claims_of_a_growth_report(growth_report):
    assert "*insert* over *continued*, basic: 0.0900 ± 0.0100 (holds)" in growth_report
    assert "*insert* over *continued*, basic, equal steps: 0.0900 ± 0.0100 (holds)" in growth_report
    assert "than dense continuation.** Holds." in growth_report
    # insert beats continued, but nothing is known of LoRA.
    one_of_two = "beats LoRA.** Open. *insert* over *continued*, rich: 0.1000 ± 0.0000 (holds)."
    assert one_of_two in growth_report
    assert "with the whole budget.** Open." in growth_report  # they are equal
    assert "LLaMA-Pro" not in growth_report  # nothing is said of arms that are not there
    first_page = growth_report[: growth_report.index("A claim *holds* if")]
    assert "![Growing or not, with four times the budget](longer.png)" in first_page
    assert "| Expansion forgets less of the old data than dense continuation. | holds |\n" in first_page
    assert "| Doubling the blocks after half of the budget saves FLOPs over" in first_page
    assert "from scratch. | contradicted |\n" in first_page  # it never has that loss
    claim = "without a decay, doubling the blocks after half of it beats never growing."
    assert f"| At this budget, {claim} | contradicted |\n" in first_page
    assert f"budget, {claim} | holds |\n" in first_page


def test_tables_of_a_growth_report(growth_report):
    row = "| insert | 200 | 2.2100 ± 0.0100 | 1.2100 ± 0.0100 | 2.2100 ± 0.0100 | 1.2100 ± 0.0100 |"
    assert row + " 0.0000 ± 0.0000 | 20, 20, 20 |" in growth_report  # below *continued* from step 110 on
    assert "| continued | 300 | 2.3100 ± 0.0100 | 1.3000 ± 0.0000 | 2.4100 ± 0.0100 |" in growth_report
    assert "| never grown | 2.9000 ± 0.0000 |  | never, never, never |  |  |" in growth_report
    (row,) = re.findall(r"\| insert at 25 % \| 2.1000 ± 0.0000 \| .*", growth_report)
    assert row.endswith(" | 0.8000 ± 0.0000 | holds |")
    row = re.findall(r"\| insert at 50 % .*", growth_report)[-1]  # of part longer
    numbers = "1.31 ± 0.02 | 1.33, 1.31, 1.29 | 0.0900 ± 0.0100 | holds |"
    assert row == f"| insert at 50 % | 2.8100 ± 0.0100 | {numbers}"
    assert "| VBench temporal flickering | 0.900 ± 0.000 | 0.900 ± 0.000 | 0.900 ± 0.000 |" in growth_report
