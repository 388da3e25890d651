"""The window of growth: what the results of lab/scale.py say, in tables and pictures.

**Three questions** about an arm and another one, for each seed:

- By how much is its final loss lower, with the same budget?
- How many times the FLOPs does the other one need for the same loss? Its final losses lie on a curve over the
  budgets, on which a power law is assumed between neighbours. If it never has that loss, the arm's own curve
  tells at how many FLOPs the arm had the other one's final loss. With two budgets both are rough.
- From which budget on, and until which, is its loss lower? The difference is taken as straight over the
  logarithm of the FLOPs between two budgets.

*Large from scratch* has twice as many points, since the arm with the additional compute only is the same
training with half of the budget. lab/report.py puts `scale_section` into results/README.md.

found is {budget: {arm: {seed: result}}}. Left out: fits of a scaling law over all budgets, which three or
four points do not support.
"""

import itertools
import json
import math
from pathlib import Path
from statistics import mean, stdev

import numpy as np

from lab.plots import new_plot, save_plot
from lab.tables import markdown_table, provenance, spread
from lab.verdicts import first_reached, gains, loss_curve, measure, verdict

NEVER, SCRATCH = "never grown", "large from scratch"
EXTRA = "large from scratch, additional compute"  # as much as HALFWAY spends after growth
HALFWAY, HALF_MORE = "doubled at 50 %", "half more at 50 %"
SCALE = (
    "The loss on `rich` of models that were trained, grown or not, with several budgets (lab/scale.py). A"
    " budget counts the FLOPs of training, those of the base included. In its last fifth the learning rate"
    " decays to zero. *Lower than* is a difference of final losses within each seed, with the verdict by the"
    " rule above (holds: the arm is better). *Times fewer FLOPs*: for the same loss the other arm needs this"
    " many times more. If it never has that loss, the ratio is that of its FLOPs to those for which the arm"
    " has its final loss. Between two budgets a power law is assumed, so with few budgets these ratios are"
    " rough: the spread over seeds does not show that error. In brackets is the ratio if the base exists"
    " already and costs nothing. *Mixes at* is the step after growth from which on the loss is lower than"
    " that of *never grown* at equal FLOPs, for each seed. All losses are those of the EMA, which lags 100"
    " steps behind the weights: it softens the spike of plain copies. Tokens are those of the clips, as often"
    " as they were seen, the base's included. The steps of a grown model are those since its growth."
)
RATES = (
    "Final losses with other learning rates, compared within each seed; a number without a spread is of one"
    " seed:"
)


def read_scale(folder: Path) -> dict:
    """The results of lab/scale.py in `folder`, in order. A budget has the seeds of *never grown*, or without
    that arm those of all. An arm that still lacks one is left out, and a note says so."""
    results = [json.loads(file.read_text()) for file in folder.glob("*.json")]
    found = {}
    for result in sorted(results, key=lambda each: (each["budget"], each["arm"], each["seed"])):
        by_seed = found.setdefault(result["budget"], {}).setdefault(result["arm"], {})
        by_seed[result["seed"]] = result
    for budget, arms in list(found.items()):
        seeds = sorted(arms.get(NEVER) or set.intersection(*map(set, arms.values())))
        late = [arm for arm, by_seed in arms.items() if not set(seeds) <= set(by_seed)]
        if late:
            print(
                f"note: {folder.name}, budget {budget:g}: {'; '.join(late)} left out, since seeds are missing"
            )
        found[budget] = {
            arm: {seed: by_seed[seed] for seed in seeds} for arm, by_seed in arms.items() if arm not in late
        }
        if not seeds:
            del found[budget]
    return found


# --------------------------------------------------------------------------------------------------------
# Numbers of one seed


def final_losses(found, arm, seed) -> list[tuple[float, float]]:
    """[(FLOPs, final loss)] of an arm, for each budget that this seed has, from few FLOPs to many."""
    points = []
    for arms in found.values():
        for name in (arm, EXTRA) if arm == SCRATCH else (arm,):
            if seed in arms.get(name, {}):
                _, flops, loss = loss_curve(arms[name][seed], "val_loss")[-1]
                points.append((flops, loss))
    return sorted(points)


def flops_for(points, loss) -> float | None:
    """The FLOPs for which [(FLOPs, loss)] comes down to `loss`, on the power law between neighbours; None if
    it never does, or is lower from the start: how much lower the FLOPs could be is not known then."""
    if not points or points[0][1] < loss:
        return None
    reached = first_reached([(math.log(x), math.log(y)) for x, y in points], math.log(loss))
    return None if reached is None else math.exp(reached)


def equal_loss_ratio(found, budget, arm, other, seed) -> float | None:
    """How many times the FLOPs of an arm another one needs for the same loss: the final loss of the arm with
    this budget, or if the other one never has that, the final loss of the other one. None if no budget tells,
    or one of the two results is not there."""
    pair = [found[budget].get(name, {}).get(seed) for name in (arm, other)]
    if None in pair:
        return None
    (_, flops, loss), (_, other_flops, other_loss) = (loss_curve(each, "val_loss")[-1] for each in pair)
    needed = flops_for(final_losses(found, other, seed), loss)
    if needed is not None:
        return needed / flops
    needed = flops_for(final_losses(found, arm, seed), other_loss)
    return None if needed is None else other_flops / needed


def lead(found, arm, other, seed) -> str:
    """At how many FLOPs the final loss of an arm begins, or ceases, to be lower than that of another one:
    "from 4e+13", "until 6e+13", "everywhere", "nowhere", among the budgets that both have; empty if these are
    fewer than two."""
    gaps = []
    for arms in found.values():
        if seed in arms.get(arm, {}) and seed in arms.get(other, {}):
            mine, theirs = (loss_curve(arms[name][seed], "val_loss")[-1] for name in (arm, other))
            gaps.append((math.log(mine[1]), mine[2] - theirs[2]))
    if len(gaps) < 2:
        return ""
    words = []
    for (x0, y0), (x1, y1) in itertools.pairwise(gaps):
        if (y0 < 0) != (y1 < 0):
            flops = math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
            words.append(f"{'from' if y1 < 0 else 'until'} {flops:.2g}")
    return " ".join(words) or ("everywhere" if gaps[0][1] < 0 else "nowhere")


def steps_to_cross(result, reference) -> int | None:
    """The first step since its growth from which a model has a lower validation loss than `reference` at
    equal FLOPs; None if there is none. Points are those of its curve; `reference` is straight between its
    own, over the logarithm of the FLOPs."""
    curve = [point for point in loss_curve(reference, "val_loss") if point[1] > 0]
    flops = np.log([point[1] for point in curve])
    losses = [point[2] for point in curve]
    first = None
    for step, spent, loss in reversed(loss_curve(result, "val_loss")):
        if loss >= np.interp(np.log(spent), flops, losses):
            break
        first = step
    return first


# --------------------------------------------------------------------------------------------------------
# Tables


def ratio_cell(found, budget, arm, other) -> str:
    """Times fewer FLOPs than another arm: "1.25 ± 0.03"; of a grown arm, beside one that needs no base, also
    with the base free: "1.25 ± 0.03 (2.50 ± 0.06)"."""
    counted, free = [], []
    for seed, result in found[budget][arm].items():
        ratio = equal_loss_ratio(found, budget, arm, other, seed)
        if ratio is not None:
            counted.append(ratio)
            free.append(ratio * result["flops"] / (result["flops"] - result["base_flops"]))
    if not counted or arm == other:
        return ""
    grown = any(result["base_flops"] for result in found[budget][arm].values())
    return spread(counted, 2) + (f" ({spread(free, 2)})" if grown and other == SCRATCH else "")


def lower_cell(arms, arm, other) -> str:
    """By how much the final loss of an arm is lower than that of another one, and the verdict."""
    values = gains(arms.get(arm, {}), arms.get(other, {}), "last")
    return f"{spread(values, 4)} ({verdict(values)})" if values and arm != other else ""


def mixing_cell(arms, arm) -> str:
    """Where a grown model crosses *never grown*, for each seed."""
    words = []
    for seed, result in arms[arm].items():
        if result["base_flops"] and seed in arms.get(NEVER, {}):
            step = steps_to_cross(result, arms[NEVER][seed])
            words.append("never" if step is None else str(step))
    return ", ".join(words)


def budget_table(found, budget) -> str:
    """The arms of one budget."""
    rows = []
    for arm, by_seed in found[budget].items():
        result = by_seed[min(by_seed)]
        cells = [arm, str(result["curve"][-1]["step"])]
        cells.append(spread([measure(each, "last") for each in by_seed.values()], 4))
        if arm == EXTRA:  # it spends less than the others, and is a point of the curve of SCRATCH
            cells += [""] * 4
        else:
            cells += [lower_cell(found[budget], arm, other) for other in (NEVER, SCRATCH)]
            cells += [ratio_cell(found, budget, arm, other) for other in (NEVER, SCRATCH)]
        cells += [mixing_cell(found[budget], arm), f"{result['tokens'] / result['parameters']:.2g}"]
        rows.append(cells)
    titles = ["arm", "steps", "final loss"]
    for what in ("lower than", "times fewer FLOPs than"):
        titles += [f"{what} *{other}*" for other in (NEVER, SCRATCH)]
    titles += ["mixes at", "tokens per parameter"]
    used = [i for i in range(len(titles)) if any(row[i] for row in rows)]  # one budget gives no ratio
    return markdown_table([titles[i] for i in used], [[row[i] for i in used] for row in rows])


def lead_table(found) -> str:
    """For which FLOPs each arm has the lower loss, for each seed, among the budgets that it has."""
    first = next(iter(found.values()))
    rows = []
    for arm in dict.fromkeys(arm for arms in found.values() for arm in arms if arm != EXTRA):
        cells = [arm]
        for other in (NEVER, SCRATCH):
            words = [lead(found, arm, other, seed) for seed in first.get(arm, {}) if arm != other]
            cells.append(", ".join(filter(None, words)))
        if any(cells[1:]):
            rows.append(cells)
    titles = ["FLOPs for which the final loss is lower than that of", f"*{NEVER}*", f"*{SCRATCH}*"]
    return markdown_table(titles, rows)


def rates_of(result) -> str:
    """The peak learning rate of a result: "0.003"; if its base had another one, "0.003, then 0.006"."""
    trainings = [arguments for arguments in (result["base"], result["arguments"]) if arguments]
    rates = [arguments[arguments.index("--lr") + 1] for arguments in trainings]
    return ", then ".join(dict.fromkeys(rates))


def rates_table(folder: Path) -> str:
    """Final losses with other learning rates (lab/scale.py, --tune and --rates); empty without any."""
    found = {}
    for result in (json.loads(file.read_text()) for file in folder.rglob("*.json")):
        arm = result["arm"].partition(", rate ")[0]
        arms = found.setdefault((result["budget"], rates_of(result)), {})
        arms.setdefault(arm, {})[result["seed"]] = result
    rows = []
    for (budget, rates), arms in found.items():
        for arm, by_seed in arms.items():
            losses = [measure(each, "last") for each in by_seed.values()]
            rows.append([f"{budget:g}", arm, rates, spread(losses, 4), lower_cell(arms, arm, NEVER)])
    rows.sort(key=lambda row: (float(row[0]), *row[1:3]))
    titles = ["budget", "arm", "rate", "final loss", f"lower than *{NEVER}*, same rate"]
    return markdown_table(titles, rows) if rows else ""


def total_flops(arms) -> str:
    """The FLOPs of a budget, in words."""
    return f"{max(each['flops'] for by_seed in arms.values() for each in by_seed.values()):.2g} FLOPs"


def scale_claims(name: str, found) -> list[list[str]]:
    """Rows of the first table of the report: does growing after half of a budget beat never growing? `name`
    is that of the folder of the results."""
    rows, where = [], "" if name == "scale" else f"{name}: "
    for arms in found.values():
        for arm in (HALF_MORE, HALFWAY):
            values = gains(arms.get(arm, {}), arms.get(NEVER, {}), "last")
            if values:
                claim = f"{where}With {total_flops(arms)} and a decay at the end, *{arm}* beats *{NEVER}*."
                rows.append([claim, verdict(values)])
    return rows


def budget_lines(found, budget) -> list[str]:
    """What one budget says."""
    arms = found[budget]
    by_seed = next(iter(arms.values()))
    result = by_seed[min(by_seed)]
    arguments = result["arguments"]
    clips, batch = (arguments[arguments.index(name) + 1] for name in ("--clips", "--batch"))
    seeds = ", ".join(map(str, by_seed))
    rates = " or ".join(sorted({rates_of(each) for results in arms.values() for each in results.values()}))
    details = f"{clips} clips, {batch} a step, learning rate {rates}, seeds {seeds}"
    text = [f"Budget {budget:g}: {total_flops(arms)} ({details}):"]
    text.append(budget_table(found, budget))
    cell = lower_cell(arms, HALFWAY, EXTRA)
    if cell:
        text.append(
            f"If the base is there already, *{HALFWAY}* and *{EXTRA}* spend the same. The final loss of the"
            f" first one is lower by {cell}."
        )
    return [*text, provenance(arms)]


def scale_section(folder: Path, found) -> list[str]:
    """The paragraphs on the results of lab/scale.py in `folder`, as `read_scale` found them; pictures are
    written beside it. Empty without results."""
    if not found:
        return []
    names = [f"{folder.name}-{what}.png" for what in ("loss", "gain")]
    plot_loss(found, folder.parent / names[0])
    plot_gain(found, folder.parent / names[1])
    text = [f"## The window of growth: {folder.name}", SCALE]
    text += [f"![Gain over never growing]({names[1]})", f"![Loss over FLOPs]({names[0]})"]
    if len(found) > 1:
        text.append(lead_table(found))
    for budget in found:
        text += budget_lines(found, budget)
    rates = rates_table(folder / "rates")
    if rates:
        text += [RATES, rates]
    return text


# --------------------------------------------------------------------------------------------------------
# Pictures


def draw_band(axes, by_seed, colour):
    """The curve of an arm with one budget: mean and standard deviation over seeds, without the start."""
    curves = [loss_curve(result, "val_loss")[1:] for result in by_seed.values()]
    flops = [point[1] for point in curves[0]]
    losses = np.array([[point[2] for point in curve] for curve in curves])  # (seeds, points)
    middle, deviation = losses.mean(0), losses.std(0, ddof=len(losses) > 1)
    axes.plot(flops, middle, color=colour, lw=1)
    axes.fill_between(flops, middle - deviation, middle + deviation, color=colour, alpha=0.2, lw=0)
    axes.plot(flops[-1], middle[-1], "o", color=colour)


def plot_loss(found, path: Path):
    """Loss over FLOPs of every budget, from half of the smallest one on: the curves part where the learning
    rate decays."""
    figure, axes = new_plot(xlabel="FLOPs, those of the base included", ylabel="loss on rich")
    axes.set(xscale="log", yscale="log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.3g}")
    drawn = []
    for number, arm in enumerate((NEVER, SCRATCH, HALFWAY, HALF_MORE)):
        for arms in found.values():
            if arm in arms:
                draw_band(axes, arms[arm], f"C{number}")
                drawn += arms[arm].values()
        axes.plot([], [], color=f"C{number}", label=arm)
    budgets = sorted({float(f"{result['flops']:.2g}") for result in drawn})
    start = 0.45 * min(budgets, default=0)
    losses = [loss for result in drawn for _, flops, loss in loss_curve(result, "val_loss") if flops > start]
    if losses:
        axes.set(xlim=(start, 1.15 * budgets[-1]), ylim=(0.98 * min(losses), 1.02 * max(losses)))
        ticks = [budgets[0] / 2, *budgets]
        axes.set_xticks(ticks, [f"{flops:.2g}" for flops in ticks])
        axes.set_xticks([], minor=True)
    axes.legend()
    save_plot(figure, path)


def percent_lower(by_arm, arm) -> list[float]:
    """By how many per cent the final loss of an arm is lower than that of *never grown*, for each seed."""
    small, mine = by_arm.get(NEVER, {}), by_arm.get(arm, {})
    seeds = sorted(small.keys() & mine.keys())
    return [100 * (1 - measure(mine[seed], "last") / measure(small[seed], "last")) for seed in seeds]


def plot_gain(found, path: Path):
    """By how many per cent the final loss is lower than that of never growing, over the budget: growing pays
    where a line is above zero. The bars are the standard deviation over seeds. The arms of a budget stand
    side by side."""
    figure, axes = new_plot(xlabel="budget in FLOPs, those of the base included", xscale="log")
    axes.set(ylabel=f"% lower final loss than {NEVER}", title="Growing pays above zero")
    axes.axhline(0, color="grey", lw=1)
    arms = dict.fromkeys(arm for by_arm in found.values() for arm in by_arm if arm not in (NEVER, EXTRA))
    budgets = [next(iter(next(iter(by_arm.values())).values()))["flops"] for by_arm in found.values()]
    colours = {}
    for number, arm in enumerate(arms):
        points = []
        for flops, by_arm in zip(budgets, found.values(), strict=True):
            values = percent_lower(by_arm, arm)
            if values:
                beside = flops * 1.015 ** (number - (len(arms) - 1) / 2)
                points.append((beside, mean(values), stdev(values) if len(values) > 1 else 0))
        if points:
            kind, _, plain = arm.partition(", plain")
            colour = colours.setdefault(kind, f"C{len(colours)}")
            style = {"ls": "--", "mfc": "white"} if plain else {"ls": "-"}
            axes.errorbar(*zip(*points, strict=True), fmt="o", capsize=2, label=arm, color=colour, **style)
    if colours:
        axes.legend(fontsize=7)
    axes.set_xticks(budgets, [f"{flops:.2g}" for flops in budgets])
    axes.minorticks_off()
    axes.set_xlim(min(budgets) / 1.3, max(budgets) * 1.3)
    save_plot(figure, path)
