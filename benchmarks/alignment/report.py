"""Makes the results page, its figures and the README's table from the stored results. One command, no training.

python benchmarks/alignment/report.py
"""

import json
import re
from pathlib import Path
from string import Template

import compass
import figures
import paths
import tables
from claims import in_short, is_compared
from comparison import TITLES, Comparison
from earlier import Earlier
from edges import edge_table
from objectives import OBJECTIVES
from plan import WORLDS
from rounds import load_rounds
from store import RESULTS


PAGE = paths.REPOSITORY / "docs" / "results.md"
README = paths.REPOSITORY / "README.md"
OWN = paths.REPOSITORY / "docs" / "own_preferences.md"


def readme_part(worlds: dict[str, Comparison], cost: dict) -> str:
    """What the README shows: each objective at its own best, on test images."""
    header = ["objective", *(f"{TITLES[world]}: gain; share right" for world in worlds), "time of a step"]
    lines = [["base", *(f"0; {c.base_follows():.2f}" for c in worlds.values()), ""]]
    for name in ("sft", "scaled", "mapo", "dpo", "orpo"):
        cells = [readme_cell(c, name) if is_compared(c) else "not run yet" for c in worlds.values()]
        lines.append([tables.label(name), *cells, f"{cost[name]['time']:.2f}"])
    ours = [
        f"{tables.setting('orpo', c.choices['orpo'])} and {c.choices['orpo'].step} steps on {TITLES[c.world]}"
        for c in worlds.values()
        if is_compared(c)
    ]
    return f"{tables.rows(header, lines)}\n\nORPO has {', '.join(ours)}."


def readme_cell(c: Comparison, name: str) -> str:
    runs, step = c.tests(name), c.choices[name].step
    return f"{c.estimate(runs, step):{c.signed}}; {c.estimate(runs, step, 'follows').mean:.2f}"


def values_of_page(worlds: dict[str, Comparison], earlier: dict[str, Earlier], cost: dict) -> dict[str, str]:
    """What the page's template asks for."""
    values = {
        "in_short": in_short(worlds, earlier, cost),
        "completeness": tables.completeness(worlds),
        "earlier": tables.earlier_table(earlier),
        "cost": tables.cost_table(cost),
        "flips": tables.flip_table(worlds["prompt"], cost),
        "votes": tables.vote_table(worlds["prompt"]),
        "variants": tables.variant_table(worlds["prompt"]),
        "compass": compass_table(worlds),
        "edges": edge_table(),
    }
    for world, c in worlds.items():
        values |= {
            f"test_{world}": tables.test_table(c, cost),
            f"leads_{world}": tables.lead_table(c),
            f"kept_{world}": tables.kept_table(c),
            f"search_{world}": tables.search_table(c),
            f"finals_{world}": tables.finals_table(c),
            f"seen_{world}": tables.seen_prompts_table(c),
            f"settings_{world}": tables.all_settings(c),
            f"noise_{world}": f"{c.base['noise']:.0%}",
            f"long_{world}": tables.long_table(c),
            f"betas_{world}": tables.beta_table(c),
            f"flat_{world}": tables.flat_table(c),
        }
    return values


def compass_table(worlds: dict[str, Comparison]) -> str:
    """By world and objective: correlation, and what choosing by accuracy alone gets."""
    lines = []
    for world, c in worlds.items():
        for name in OBJECTIVES:
            found, price = compass.points(c, name), compass.price(c, name)
            if price and len(found) >= 12:
                reached, best = price
                cells = [str(len(found)), f"{compass.correlation(found):.2f}", f"{reached.gain:{c.signed}}"]
                lines.append(
                    [TITLES[world], tables.label(name), *cells, f"{reached.follows:.2f}", f"{best:{c.signed}}"]
                )
    header = [
        "world",
        "objective",
        "points",
        "r",
        "gain, chosen by accuracy",
        "follows prompt",
        "best gain that the rule lets in",
    ]
    return tables.rows(header, lines) if lines else tables.NOT_YET


def load() -> tuple[dict[str, Comparison], dict[str, Earlier], dict]:
    cost = json.loads((RESULTS / "cost.json").read_text())
    return {world: Comparison(world) for world in WORLDS}, {world: Earlier(world) for world in WORLDS}, cost


def pages() -> dict[Path, str]:
    """The current text of every page that holds results."""
    worlds, earlier, cost = load()
    page = Template((paths.HERE / "results_page.template").read_text()).substitute(
        values_of_page(worlds, earlier, cost)
    )
    readme = between(README.read_text(), "alignment", readme_part(worlds, cost))
    rounds = tables.rounds_table(worlds["smile"], load_rounds())
    return {PAGE: page, README: readme, OWN: between(OWN.read_text(), "rounds", rounds)}


def between(text: str, name: str, part: str) -> str:
    """The text with this part between its two marks."""
    marks = rf"(<!-- {name} -->\n).*(<!-- /{name} -->)"
    return re.sub(marks, lambda m: f"{m[1]}{part}\n{m[2]}", text, flags=re.DOTALL)


def main() -> None:
    worlds, _, _ = load()
    begun = {world: c for world, c in worlds.items() if any(c.settings(name) for name in OBJECTIVES)}
    figures.draw_frontier(begun)
    figures.draw_compass(begun)
    if compared := {world: c for world, c in begun.items() if is_compared(c)}:
        figures.draw_curves(compared)
    for page, text in pages().items():
        page.write_text(text)
        print(f"Wrote {page.relative_to(paths.REPOSITORY)}")


if __name__ == "__main__":
    main()
