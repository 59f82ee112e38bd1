"""Makes the results pages, their figure and the README's table from the stored results. One command, no training.

python benchmarks/alignment/report.py
"""

import argparse
import json
import re
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from string import Template

import matplotlib
import numpy as np

import paths
import plan
from intervals import Estimate, estimate, holm
from objectives import OBJECTIVES
from settings import TASKS, Experiment
from store import RESULTS, Runs, load_base, load_runs, values


matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402


TITLES = {"digits": "digits", "prompt": "prompt adherence", "smile": "smile"}
SIGNED = {"digits": "+.3f", "prompt": "+.2f", "smile": "+.2f"}
COLORS = dict(zip(OBJECTIVES, ("#7f7f7f", "#2ca02c", "#9467bd", "#ff7f0e", "#1f77b4", "#d62728")))
NOT_RUN = "Not run yet."


def label(setting: Experiment) -> str:
    return OBJECTIVES[setting.objective].label


def parameters(setting: Experiment) -> str:
    """Strength, temperature and learning rate, and whatever else is not as usual."""
    symbol = OBJECTIVES[setting.objective].symbol
    parts = [f"{symbol} {setting.strength:g}"] if symbol else []
    parts += [f"temperature {setting.temperature:g}"] if setting.temperature != 1 else []
    parts += [f"lr {setting.learning_rate:g}"]
    parts += ["no clipping"] if setting.clip > 1 else []
    parts += [f"mean of weights {setting.ema:g}"] if setting.ema else []
    parts += [f"cap {setting.cap:g}"] if setting.cap else []
    return ", ".join(parts)


def table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if lines else NOT_RUN


@dataclass
class Result:
    """The runs of one setting on one task, by seed."""

    setting: Experiment
    runs: dict[int, dict[int, dict]]
    base: dict

    @property
    def last(self) -> int:
        """The last step that all its runs have reached."""
        return max(set.intersection(*(set(run) for run in self.runs.values())))

    def gains(self, step: int) -> np.ndarray:
        """Mean reward of each seed and prompt above the base's."""
        return values(list(self.runs.values()), step, "rewards") - np.array(self.base["rewards"])

    def gain(self, step: int) -> Estimate:
        return estimate(self.gains(step))

    def adherence(self, step: int) -> float:
        return float(values(list(self.runs.values()), step, "adherence").mean())

    def mean(self, step: int, name: str) -> float:
        return float(values(list(self.runs.values()), step, name).mean())

    def winner_errors(self, step: int) -> np.ndarray:
        """Held-out winners' error relative to the base's, by quarter of the noise levels; one value where only that is stored."""
        errors = values(list(self.runs.values()), step, "m_w").mean(axis=0)
        base = np.array(self.base["m_w"])
        return errors / (base if len(errors) == len(base) else base.mean())

    def distance(self, step: int) -> float:
        return self.mean(step, "distance")


def finished(results: list[Result]) -> list[Result]:
    """Those with a run that reached its last step; the runs that did not are left out."""
    kept = []
    for result in results:
        runs = {seed: run for seed, run in result.runs.items() if result.setting.steps in run}
        kept += [replace(result, runs=runs)] if runs else []
    return kept


def load_results(task: str) -> list[Result]:
    """A task's runs that were finished."""
    return finished(group(load_runs(task), load_base(task)))


def load_constant(task: str) -> list[Result]:
    """A task's earlier runs at constant rates."""
    runs = {e: run for e, run in load_runs("constant_rate").items() if e.task == task}
    return group(runs, load_base("constant_rate", task))


def group(runs: Runs, base: dict | None) -> list[Result]:
    """Runs by setting, in the reverse order of the objectives."""
    found: dict[Experiment, dict] = {}
    for experiment, run in sorted(runs.items(), key=lambda item: item[0].seed):
        found.setdefault(replace(experiment, seed=0), {})[experiment.seed] = run
    order = list(OBJECTIVES)
    settings = sorted(found, key=lambda s: (-order.index(s.objective), s.strength, s.temperature, s.learning_rate))
    return [Result(setting, found[setting], base) for setting in settings if base]


def is_main(setting: Experiment) -> bool:
    """Whether it belongs to the comparison, and not to wrong labels or an ablation."""
    return (setting.flipped, setting.clip, setting.ema, setting.cap) == (0, 1, 0, 0)


def main_table(results: dict[str, list[Result]]) -> str:
    """Every setting at its last step."""
    lines = []
    for task, found in results.items():
        if found:
            base = found[0].base
            lines.append([f"**{TITLES[task]}**", "base", "", "0", f"{np.mean(base['adherence']):.2f}", "1.00", ""])
        for result in found:
            if is_main(result.setting):
                lines.append(["", label(result.setting), *cells(result, result.last)])
    return table(["task", "objective", "setting; seeds", "gain", "adherence", "m_w", "distance"], lines)


def cells(result: Result, step: int) -> list[str]:
    signed = SIGNED[result.setting.task]
    errors = result.winner_errors(step)
    overall = errors.mean() if len(errors) == 1 else mean_error(result, step)
    seeds = f"{len(result.runs)}"
    return [
        f"{parameters(result.setting)}; {seeds}",
        f"{result.gain(step):{signed}}",
        f"{result.adherence(step):.2f}",
        f"{overall:.2f}",
        f"{result.distance(step):.1f}",
    ]


def mean_error(result: Result, step: int) -> float:
    return result.mean(step, "m_w") / float(np.mean(result.base["m_w"]))


def leads_table(results: dict[str, list[Result]]) -> str:
    """Even share's lead over each other setting in gain and prompt adherence, over the seeds that both have; Holm over all of them."""
    leads = []
    for task, found in results.items():
        main = [result for result in found if is_main(result.setting)]
        for ours, theirs in combinations(main, 2):
            seeds = sorted(set(ours.runs) & set(theirs.runs))
            if ours.setting.objective == "even" != theirs.setting.objective and seeds:
                pair = [replace(each, runs={seed: each.runs[seed] for seed in seeds}) for each in (ours, theirs)]
                gain = estimate(pair[0].gains(ours.last) - pair[1].gains(theirs.last))
                adherence = pair[0].adherence(ours.last) - pair[1].adherence(theirs.last)
                leads.append((task, *pair, gain, adherence))
    lines = []
    for (task, ours, theirs, gain, adherence), p in zip(leads, holm([lead[3].p for lead in leads])):
        over = f"{label(theirs.setting)}, {parameters(theirs.setting)}"
        seeds = str(len(ours.runs))
        lines.append(
            [TITLES[task], parameters(ours.setting), over, seeds]
            + [f"{gain:{SIGNED[task]}}", f"{p:.2g}", f"{adherence:+.2f}"]
        )
    return table(["task", "even share", "over", "seeds", "lead in gain", "p (Holm)", "in adherence"], lines)


def steps_table(found: list[Result]) -> str:
    """Every setting at every step that was measured; the winners' error by quarter, from the least noise to the most."""
    lines = []
    for result in found:
        for step in sorted(set.intersection(*(set(run) for run in result.runs.values()))):
            gain = f"{result.gain(step).mean:{SIGNED[result.setting.task]}}"
            quarters = ", ".join(f"{value:.2f}" for value in result.winner_errors(step))
            lines.append(
                [label(result.setting), parameters(result.setting), str(len(result.runs)), str(step), gain]
                + [f"{result.adherence(step):.2f}", quarters, f"{result.distance(step):.1f}"]
            )
    header = ["objective", "setting", "seeds", "step", "gain", "adherence", "m_w by quarter", "distance"]
    return table(header, lines)


def constant_table(found: list[Result]) -> str:
    """A row for each setting: gain and adherence by step."""
    steps, lines = (200, 400, 1000, 2000), []
    for result in found:
        signed, by_step = SIGNED[result.setting.task], []
        for step in steps:
            has = all(step in run for run in result.runs.values())
            by_step.append(f"{result.gain(step).mean:{signed}}, {result.adherence(step):.2f}" if has else "")
        lines.append([label(result.setting), parameters(result.setting), *by_step])
    return table(["objective", "setting", *(f"{step} steps" for step in steps)], lines)


def draw_frontier(results: dict[str, list[Result]], file: Path) -> None:
    """Gain against prompt adherence, each setting's path through its steps; the largest point is the last one."""
    figure, axes = plt.subplots(1, len(results), figsize=(4.4 * len(results), 3.6), layout="constrained")
    for axis, (task, found) in zip(np.atleast_1d(axes), results.items()):
        named = set()
        for result in (each for each in found if is_main(each.setting)):
            steps = sorted(set.intersection(*(set(run) for run in result.runs.values())))
            points = [(result.adherence(step), result.gain(step).mean) for step in steps]
            name, color = label(result.setting), COLORS[result.setting.objective]
            axis.plot(*zip(*points), "-", color=color, alpha=0.5, linewidth=1)
            axis.scatter(
                *zip(*points), s=[12] * (len(steps) - 1) + [40], color=color, label=None if name in named else name
            )
            named.add(name)
        if found:
            axis.axvline(0.9 * np.mean(found[0].base["adherence"]), color="gray", linestyle=":", linewidth=1)
        axis.set(title=TITLES[task], xlabel="prompt adherence", ylabel="gain in reward")
    axis.legend(fontsize=7)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
    plt.close(figure)


def readme_table(results: dict[str, list[Result]], constant: dict[str, list[Result]], cost: dict) -> str:
    """Gain and prompt adherence: of the plan's runs at their last step, and of the earlier ones at a constant rate after 1,000."""
    lines = [["base", "", *(f"0; {np.mean(found[0].base['adherence']):.2f}" for found in constant.values()), ""]]
    for name in (*plan.MAIN, *plan.OTHER):
        time = f"{cost[name]['time']:.2f}" if name in cost else f"{cost['orpo']['time']:.2f}"
        for place, title in enumerate(("falling", "falling, second setting")):
            shown = [readme_cell(planned(found, task, name, place)) for task, found in results.items()]
            lines += [[OBJECTIVES[name].label, title, *shown, time]] if any(shown) else []
    for name in plan.MAIN[1:] + plan.OTHER:
        shown = [readme_cell(at_constant_rate(found, task, name), 1000) for task, found in constant.items()]
        lines.append([OBJECTIVES[name].label, "constant, five seeds", *shown, f"{cost[name]['time']:.2f}"])
    return table(["objective", "learning rate", *(TITLES[task] for task in results), "time of a step"], lines)


def at_constant_rate(found: list[Result], task: str, name: str) -> Result:
    """An objective's earlier runs at the strength of its first setting."""
    strength, *_ = plan.SETTINGS[task][name][0]
    wanted = (name, strength, 1, 0)
    settings = ((r.setting.objective, r.setting.strength, r.setting.temperature, r.setting.flipped) for r in found)
    return found[list(settings).index(wanted)]


def planned(found: list[Result], task: str, name: str, place: int) -> Result | None:
    """The result of an objective's first or second setting."""
    wanted = plan.make(task, name, plan.SETTINGS[task][name][place], seed=0)
    return next((result for result in found if result.setting == wanted), None)


def readme_cell(result: Result | None, step: int | None = None) -> str:
    if result is None:
        return ""
    step = step or result.last
    return f"{result.gain(step).mean:{SIGNED[result.setting.task]}}; {result.adherence(step):.2f}"


def sentence(result: Result | None) -> str:
    """Gain, prompt adherence and the number of seeds, for the pages' sentences."""
    if result is None:
        return "(not run yet)"
    seeds = len(result.runs)
    gain, adherence = readme_cell(result).split("; ")
    return f"{gain} with {adherence} right ({seeds} seed{'s' if seeds > 1 else ''})"


def pages() -> dict[str, str]:
    """The current text of every page that holds results, by its place in the repository."""
    results = {task: load_results(task) for task in TASKS}
    constant = {task: load_constant(task) for task in TASKS}
    cost = json.loads((RESULTS / "cost.json").read_text())
    parts = {
        "main": main_table(results),
        "leads": leads_table(results),
        "time": f"{cost['dpo']['time'] / cost['orpo']['time']:.2f}",
    }
    wrong = [result for result in results["prompt"] if result.setting.flipped]
    parts["wrong_labels"] = steps_table(wrong)
    ablations = [r for found in results.values() for r in found if not is_main(r.setting) and not r.setting.flipped]
    parts["ablations"] = steps_table(ablations)
    for task in TASKS:
        parts[f"steps_{task}"] = steps_table([result for result in results[task] if is_main(result.setting)])
        parts[f"constant_{task}"] = constant_table([r for r in constant[task] if not r.setting.flipped])
    parts["constant_wrong"] = constant_table([r for r in constant["prompt"] if r.setting.flipped])
    for task, found in results.items():
        parts |= {f"{name}_{i}_{task}": sentence(planned(found, task, name, i)) for name in OBJECTIVES for i in (0, 1)}
    templates = {"docs/results.md": "results"} | {
        f"docs/results/{name}.md": name for name in ("all_steps", "constant_rate")
    }
    made = {
        page: Template((paths.HERE / "pages" / f"{name}.template").read_text()).substitute(parts)
        for page, name in templates.items()
    }
    readme = (paths.REPOSITORY / "README.md").read_text()
    return made | {"README.md": between(readme, "alignment", readme_table(results, constant, cost))}


def between(text: str, name: str, part: str) -> str:
    """The text with this part between its two marks."""
    marks = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=paths.REPOSITORY, help="Folder of README.md and docs.")
    args = parser.parse_args()
    results = {task: load_results(task) for task in TASKS}
    draw_frontier(results, args.output_dir / "docs" / "results" / "frontier.png")
    for name, text in pages().items():
        (args.output_dir / name).write_text(text)
        print(f"Wrote {args.output_dir / name}")


if __name__ == "__main__":
    main()
