"""The page's tables. A table of runs that do not exist says so."""

import numpy as np

import search
from bootstrap import Bootstrap
from comparison import TITLES, Comparison
from compass import KEPT, keep_best, kept_step
from earlier import NAMES, Earlier
from objectives import ALL_OBJECTIVES, OBJECTIVES, VARIANTS, VOTES
from plan import BETAS, FLIPS, LONG_MARK, SEEDS, VOTE_COUNTS, VOTED
from rounds import ARMS, ROUNDS, STEPS
from search import FINAL_MARKS, LEARNING_RATES, MARKS, Choice
from store import Run


NOT_YET = "*Not run yet.*"
Tested = tuple[Choice, list[Run]]


def rows(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *lines))


def label(name: str) -> str:
    return f"**{OBJECTIVES[name].label}**" if name == "orpo" else ALL_OBJECTIVES[name].label


def setting(name: str, choice: Choice) -> str:
    strength = f"{ALL_OBJECTIVES[name].symbol} {choice.experiment.strength:g}, " if name != "sft" else ""
    return f"{strength}lr {choice.experiment.learning_rate:g}"


def bracket(name: str, choice: Choice, finished: bool) -> str:
    """Where the best setting lies among those that were tried."""
    if not finished:
        return "search not finished"
    edges = []
    for what, grid in (("strength", OBJECTIVES[name].strengths), ("learning_rate", LEARNING_RATES)):
        place = grid.index(getattr(choice.experiment, what))
        if len(grid) > 1 and place in (0, len(grid) - 1):
            edges.append(f"{'lowest' if place == 0 else 'highest'} {what.replace('_', ' ')} of the grid")
    return ", ".join(edges) or "interior"


def completeness(worlds: dict[str, Comparison]) -> str:
    """What there is so far."""
    lines = []
    for world, c in worlds.items():
        found = [
            f"{OBJECTIVES[n].label} {len(c.settings(n))}{'' if c.finished[n] else ' (not finished)'}"
            for n in OBJECTIVES
        ]
        seeds = [len(c.tests(n)) for n in OBJECTIVES]
        long = [len(c.tests(n, (LONG_MARK,))) for n in OBJECTIVES]
        lines.append(
            [
                TITLES[world],
                ", ".join(found),
                f"{span(seeds)} of {len(SEEDS)}",
                f"{span(long)} of {len(SEEDS)}",
            ]
        )
    return rows(
        ["world", "settings searched", "seeds on test images, each objective", f"of them to {LONG_MARK} steps"], lines
    )


def span(counts: list[int]) -> str:
    return f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(min(counts))


def search_table(c: Comparison) -> str:
    """Each objective at its chosen setting, on the final's images; before its search has ended at the best so far, on validation images."""
    base = c.base["splits"][search.FINAL_SPLIT[c.world]]
    lines = [["base", "", "", "", "0", f"{np.mean(base['follows']):.2f}", f"{base['distance']:.1f}", ""]]
    for name in OBJECTIVES:
        choice, tried = c.choices[name], str(len(c.settings(name)))
        if choice is None:
            none = "none of them keeps to the prompt" if c.settings(name) else "not run yet"
            lines.append([label(name), tried, none, "", "", "", "", ""])
            continue
        lines.append(
            [
                label(name),
                tried,
                setting(name, choice),
                str(choice.step),
                f"{c.gain(choice.run, choice.step):{c.signed}}",
                f"{choice.run.mean(choice.step, 'follows'):.2f}",
                f"{choice.run.mean(choice.step, 'distance'):.1f}",
                bracket(name, choice, c.finished[name]),
            ]
        )
    header = [
        "objective",
        "settings tried",
        "best of them",
        "at step",
        "gain",
        "follows prompt",
        "distance",
        "where it lies",
    ]
    return rows(header, lines)


def finals_table(c: Comparison) -> str:
    """The settings that were run with all seeds of the search: gain and share that follows the prompt, at each step."""
    lines = []
    for name in OBJECTIVES:
        for run in search.finalists(c.runs, c.base, c.world, name):
            cells = [f"{c.gain(run, step):{c.signed}}, {run.mean(step, 'follows'):.2f}" for step in FINAL_MARKS]
            lines.append([label(name), f"{run.experiment.strength:g}", f"{run.experiment.learning_rate:g}", *cells])
    header = ["objective", "strength", "learning rate", *(f"{step} steps" for step in FINAL_MARKS)]
    return rows(header, lines) if lines else NOT_YET


def seen_prompts_table(c: Comparison) -> str:
    """What the final chose when its images were of the prompts of the pairs, and how that does on the images of the test."""
    lines = []
    for name in OBJECTIVES:
        finals = search.finalists(c.runs, c.base, c.world, name, "validation")
        choice = search.choose(finals, c.needed)
        if choice and (runs := c.tests_of(choice.experiment, FINAL_MARKS)):
            cells = [f"{c.estimate(runs, choice.step):{c.signed}}", f"{c.estimate(runs, choice.step, 'follows'):.2f}"]
            lines.append([label(name), f"{setting(name, choice)}, {choice.step} steps", str(len(runs)), *cells])
    return rows(["objective", "chosen", "seeds", "gain", "follows prompt"], lines) if lines else NOT_YET


def all_settings(c: Comparison) -> str:
    """Every setting of the search, at every step."""
    lines = []
    for name in OBJECTIVES:
        for run in sorted(c.settings(name), key=lambda r: (r.experiment.strength, r.experiment.learning_rate)):
            cells = [
                f"{c.gain(run, step):{c.signed}}, {run.mean(step, 'follows'):.2f}, {run.evaluations[step]['distance']:.1f}"
                for step in MARKS
            ]
            lines.append([label(name), f"{run.experiment.strength:g}", f"{run.experiment.learning_rate:g}", *cells])
    return (
        rows(["objective", "strength", "learning rate", *(f"{step} steps" for step in MARKS)], lines)
        if lines
        else NOT_YET
    )


def step_in_time(cost: dict, name: str, step: int, marks: tuple[int, ...]) -> int:
    """The first mark at which an objective has had at least the time that ORPO takes to a step, or the last there is."""
    budget = step * cost["orpo"]["time"]
    return min((mark for mark in marks if mark * cost[name]["time"] >= budget), default=max(marks))


def test_table(c: Comparison, cost: dict) -> str:
    """Each objective on test images: at its own best step, at equal steps, and at equal compute."""
    lines = []
    for name in OBJECTIVES:
        runs, choice = c.tests(name), c.choices[name]
        if not runs:
            lines.append([label(name), "not run yet", *[""] * 8])
            continue
        compute = step_in_time(cost, name, c.choices["orpo"].step, FINAL_MARKS) if c.choices["orpo"] else None
        lines.append(
            [
                label(name),
                f"{setting(name, choice)}, {choice.step} steps",
                str(len(runs)),
                f"{c.estimate(runs, choice.step):{c.signed}}",
                f"{c.estimate(runs, choice.step, 'follows'):.2f}",
                f"{np.mean([run.evaluations[choice.step]['distance'] for run in runs]):.1f}",
                f"{c.estimate(runs, 200):{c.signed}}",
                f"{c.estimate(runs, 600):{c.signed}}",
                f"{c.estimate(runs, 1000):{c.signed}}",
                f"{c.estimate(runs, compute):{c.signed}} ({compute})" if compute else "",
            ]
        )
    header = [
        "objective",
        "own best",
        "seeds",
        "gain",
        "follows prompt",
        "distance",
        "gain at 200 steps",
        "at 600",
        "at 1000",
        "in at least ORPO's time (steps)",
    ]
    return rows(header, lines) if any(c.tests(name) for name in OBJECTIVES) else NOT_YET


def lead_table(c: Comparison) -> str:
    """How far ORPO is ahead of each on test images."""
    lines = []
    for name in OBJECTIVES:
        if name != "orpo" and c.tests(name) and c.tests("orpo"):
            lead = c.leads(name)
            over_best = f"{lead.over_best:{c.signed}} ({lead.best_step})"
            lines.append([label(name), f"{lead.gain:{c.signed}}", f"{lead.follows:+.2f}", over_best])
    header = ["ORPO's lead over", "in gain", "in prompt-following", "in gain over its best step in hindsight (step)"]
    return rows(header, lines) if lines else NOT_YET


def kept_table(c: Comparison) -> str:
    """Each objective at its own setting, each run at the step that its held-out accuracy chooses."""
    lines, ours = [], keep_best(c.tests("orpo"))
    for name in OBJECTIVES:
        if runs := c.tests(name):
            best = keep_best(runs)
            cells = [f"{c.estimate(best, KEPT):{c.signed}}", f"{c.estimate(best, KEPT, 'follows'):.2f}"]
            if ours and name != "orpo":
                lead, follows = (c.lead(ours, KEPT, best, KEPT, field) for field in ("rewards", "follows"))
                cells += [f"{lead:{c.signed}}", f"{follows:+.2f}"]
            else:
                cells += ["", ""]
            lines.append([label(name), ", ".join(str(kept_step(run)) for run in runs), *cells])
    header = [
        "objective",
        "steps kept, by seed",
        "gain",
        "follows prompt",
        "ORPO's lead in gain",
        "in prompt-following",
    ]
    return rows(header, lines) if lines else NOT_YET


def long_table(c: Comparison) -> str:
    """Reward gain, prompt and distance up to ten times 200 steps, at each objective's own setting."""
    lines = []
    for name in OBJECTIVES:
        if runs := c.tests(name, (200, 600, 1000, LONG_MARK)):
            cells = [
                f"{c.estimate(runs, s):{c.signed}}, {c.estimate(runs, s, 'follows'):.2f}, "
                f"{np.mean([run.evaluations[s]['distance'] for run in runs]):.1f}"
                for s in (200, 600, 1000, LONG_MARK)
            ]
            lines.append([label(name), str(len(runs)), *cells])
    return rows(["objective", "seeds", "200 steps", "600", "1000", str(LONG_MARK)], lines) if lines else NOT_YET


def flip_table(c: Comparison, cost: dict) -> str:
    """With exchanged labels, the setting chosen again under them: gain, prompt-following and ORPO's leads."""
    lines = []
    for flipped in sorted(FLIPS):
        found = {name: c.tests_with(name, {"flipped": flipped}) for name in OBJECTIVES}
        flat = c.tests_with("orpo", {"objective": "flat", "flipped": flipped})
        for name, each in (*found.items(), ("flat", flat)):
            if each:
                choice, runs = each
                cells = [f"{setting(name, choice)}, {choice.step} steps", str(len(runs))]
                cells += [f"{c.estimate(runs, choice.step):+.2f}", f"{c.estimate(runs, choice.step, 'follows'):.2f}"]
                leads = [flip_lead(c, cost, ours, each, name) for ours in (found["orpo"], flat)]
                lines.append([f"{flipped:.0%}", label(name), *cells, *leads])
    header = [
        "exchanged",
        "objective",
        "setting",
        "seeds",
        "gain",
        "follows prompt",
        "ORPO's lead",
        "lead at temperature 4",
    ]
    return rows(header, lines) if lines else NOT_YET


def flip_lead(c: Comparison, cost: dict, ours: Tested | None, theirs: Tested, name: str) -> str:
    """How far ours is ahead, each at its own best; and at the step where they have had at least as much time, if theirs comes later."""
    if ours is None or name not in cost or ours is theirs:
        return ""
    (choice, runs), (their_choice, their_runs) = ours, theirs
    lead = f"{c.lead(runs, choice.step, their_runs, their_choice.step):+.2f}"
    same_time = step_in_time(cost, name, choice.step, MARKS)
    if same_time >= their_choice.step:
        return lead
    return f"{lead}; {c.lead(runs, choice.step, their_runs, same_time):+.2f} after as much time ({same_time} steps)"


def flat_table(c: Comparison) -> str:
    """ORPO with a flatter sigmoid beside ORPO, at ORPO's own setting, and how far it is ahead at each step."""
    lines = []
    for step in (*FINAL_MARKS, LONG_MARK):
        both = [c.tests("orpo", (step,), objective=name) for name in ("orpo", "flat")]
        if all(both):
            cells = [f"{c.estimate(r, step):{c.signed}}, {c.estimate(r, step, 'follows'):.2f}" for r in both]
            lead, follows = (c.lead(both[1], step, both[0], step, field) for field in ("rewards", "follows"))
            lines.append([str(step), str(len(both[1])), *cells, f"{lead:{c.signed}}", f"{follows:+.2f}"])
    header = ["steps", "seeds", "ORPO: gain, follows", label("flat"), "ahead in gain", "in prompt-following"]
    return rows(header, lines) if lines else NOT_YET


def vote_table(c: Comparison) -> str:
    """What ORPO does with several votes on each pair."""
    lines = []
    for votes in VOTE_COUNTS:
        found = {name: c.tests_with("orpo", VOTED | {"objective": name, "votes": votes}) for name in VOTES}
        majority = found["majority"]
        for name, (choice, runs) in ((name, each) for name, each in found.items() if each):
            lead = (
                c.lead(runs, choice.step, majority[1], majority[0].step) if majority and name != "majority" else None
            )
            cells = [f"lr {choice.experiment.learning_rate:g}", str(choice.step), str(len(runs))]
            cells += [f"{c.estimate(runs, choice.step):+.2f}", f"{c.estimate(runs, choice.step, 'follows'):.2f}"]
            lines.append([str(votes), VOTES[name].label, *cells, f"{lead:+.2f}" if lead else ""])
    header = [
        "votes",
        "trained on",
        "setting",
        "step",
        "seeds",
        "gain",
        "follows prompt",
        "ahead of the majority's label",
    ]
    return rows(header, lines) if lines else NOT_YET


def rounds_table(c: Comparison, lines: list[dict]) -> str:
    """Three rounds of own pairs against one long round: gain and prompt-following after each third, over the seeds that all have."""
    seeds = set.intersection(*({line["seed"] for line in lines if line["arm"] == arm} for arm in ARMS))
    if not seeds:
        return NOT_YET
    bootstrap, table = Bootstrap(len(seeds), c.prompts), []

    def values(arm: str, step: int, field: str) -> np.ndarray:
        found = sorted(
            (line for line in lines if line["arm"] == arm and line["seed"] in seeds), key=lambda x: x["seed"]
        )
        return np.array([line["evaluations"][str(step)][field] for line in found], dtype=float)

    steps = [STEPS * (number + 1) for number in range(ROUNDS)]
    for arm, what in ARMS.items():
        rewards = {step: values(arm, step, "rewards") - c.base_rewards("test") for step in steps}
        cells = [f"{bootstrap.mean(rewards[s]):+.2f}, {values(arm, s, 'follows').mean():.2f}" for s in steps]
        lead = bootstrap.mean(values(arm, steps[-1], "rewards") - values("rounds", steps[-1], "rewards"))
        table.append([what.label, str(what.labels), *cells, f"{lead:+.2f}" if arm != "rounds" else ""])
    header = ["pairs", "labels", *(f"{s} steps: gain, follows" for s in steps), "ahead of the first row"]
    return f"{len(seeds)} seeds.\n\n{rows(header, table)}"


def beta_table(c: Comparison) -> str:
    """ORPO by beta, at its learning rate and the step of its choice."""
    lines, choice = [], c.choices["orpo"]
    for beta in BETAS:
        if runs := c.tests("orpo", strength=beta):
            distance = np.mean([run.evaluations[choice.step]["distance"] for run in runs])
            lines.append(
                [
                    f"{beta:g}",
                    str(len(runs)),
                    f"{c.estimate(runs, choice.step):{c.signed}}",
                    f"{c.estimate(runs, choice.step, 'follows'):.2f}",
                    f"{distance:.1f}",
                ]
            )
    return rows(["beta", "seeds", "gain", "follows prompt", "distance"], lines) if len(lines) > 1 else NOT_YET


def variant_table(c: Comparison) -> str:
    """Changes to ORPO's loss, beside ORPO itself with the same beta, rate and seeds."""
    marks, lines = MARKS[:3], []
    tried = [(name, s) for name, variant in VARIANTS.items() for s in variant.strengths]
    for name, strength in [("orpo", 0.5), *tried]:
        runs = c.tests("orpo", marks, objective=name, strength=strength)
        if runs:
            what = "none" if name == "orpo" else f"{VARIANTS[name].label}, {VARIANTS[name].symbol} {strength:g}"
            cells = [f"{c.estimate(runs, s):+.2f}, {c.estimate(runs, s, 'follows').mean:.2f}" for s in marks]
            lines.append([what, str(len(runs)), *cells])
    return (
        rows(["change", "seeds", *(f"{s} steps: gain, follows" for s in marks)], lines) if len(lines) > 1 else NOT_YET
    )


def earlier_table(worlds: dict[str, Earlier]) -> str:
    """Gain of the earlier formula and of its mended sign, and their lead over fine-tuning."""
    lines = []
    for name in NAMES:
        cells = [f"{e.gain(name):+.3f}" + (f"; {e.lead(name):+.3f}" if name != "sft" else "") for e in worlds.values()]
        lines.append([label(name), *cells])
    return rows(["objective", *(f"{TITLES[world]}: gain; lead over SFT" for world in worlds)], lines)


def cost_table(cost: dict) -> str:
    names = ["sft", *(name for name in cost if name != "sft")]
    lines = [[label(n), f"{cost[n]['time']:.2f}", f"{cost[n]['memory']:.2f}"] for n in names]
    return rows(["objective", "time of a step", "peak memory of a step"], lines)
