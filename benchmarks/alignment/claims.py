""" "In short": sentences made from the stored results, what goes against ORPO first. A sentence appears when its runs exist."""

from collections.abc import Iterator

import compass
from comparison import TITLES, Comparison
from compass import KEPT
from earlier import Earlier
from objectives import ALL_OBJECTIVES, OBJECTIVES, TEMPERATURE, VOTES
from plan import FLIPS, LONG_MARK, RECOMMENDED_BETA, SEEDS, VOTE_COUNTS, VOTED
from tables import flip_lead


ENOUGH = 3  # seeds of every objective before a comparison on test images is spoken of
OTHERS = [name for name in OBJECTIVES if name != "orpo"]
LOST = 0.1  # share of the gain that may be lost by training on, or by choosing without images
Sentence = tuple[str, bool]  # and whether it goes against ORPO


def is_compared(c: Comparison) -> bool:
    return all(len(c.tests(name)) >= ENOUGH for name in OBJECTIVES)


def in_short(worlds: dict[str, Comparison], earlier: dict[str, Earlier], cost: dict) -> str:
    """A list of sentences, each with the heading under which its table stands."""
    found = [
        (f"{TITLES[world].capitalize()}: {sentence}", is_against)
        for world, c in worlds.items()
        if is_compared(c)
        for sentence, is_against in (
            *comparison_sentences(c),
            *kept_sentences(c),
            *compass_sentences(c),
            *long_sentences(c),
        )
    ]
    found += [*flip_sentences(worlds["prompt"], cost), *flat_sentences(worlds), *vote_sentences(worlds["prompt"])]
    found += [(earlier_sentence(earlier), False), (cost_sentence(cost), False)]
    found.sort(key=lambda sentence: not sentence[1])
    return "\n".join(f"- {sentence}" for sentence in (*unfinished(worlds), *(sentence for sentence, _ in found)))


def unfinished(worlds: dict[str, Comparison]) -> Iterator[str]:
    lacking = [TITLES[world] for world, c in worlds.items() if seeds(c) < len(SEEDS)]
    if lacking:
        yield f"**The comparison is not complete**: {' and '.join(lacking)} lack seeds ([what there is](#runs))."


def seeds(c: Comparison) -> int:
    """Seeds on test images that every objective has."""
    return min(len(c.tests(name)) for name in OBJECTIVES)


def comparison_sentences(c: Comparison) -> Iterator[Sentence]:
    """Whom ORPO is behind on test images, of whom it is within noise, and of whom it is ahead, each at its own best."""
    ours, step = c.tests("orpo"), c.choices["orpo"].step
    follows = c.estimate(ours, step, "follows")
    yield (
        f"ORPO gains {c.estimate(ours, step):{c.signed}}, and {follows:.2f} of its images show what was asked,"
        f" {c.base_follows():.2f} of the base's ({anchor(c)}).",
        c.keeps_less(follows),
    )
    leads = {name: c.leads(name) for name in OTHERS}
    behind = [name for name, lead in leads.items() if lead.gain.high < 0]
    ahead = [name for name, lead in leads.items() if lead.gain.low > 0]
    level = [name for name in OTHERS if name not in behind + ahead]
    for what, names in (("**is behind**", behind), ("is within noise of", level), ("is ahead of", ahead)):
        said = [f"{OBJECTIVES[n].label} {leads[n].gain:{c.signed}}, {leads[n].follows:+.2f}" for n in names]
        if said:
            yield (
                f"ORPO {what}, in gain and in the share of right images: {'; '.join(said)} ({anchor(c)}).",
                names is not ahead,
            )
    turned = [n for n in ahead if leads[n].over_best.low <= 0]
    if turned:
        said = "; ".join(
            f"{OBJECTIVES[n].label} ({leads[n].best_step} steps) {leads[n].over_best:{c.signed}}" for n in turned
        )
        yield (
            f"over the step that turns out best on the test images themselves ORPO's lead is not clear: {said} ({anchor(c)}).",
            True,
        )


def kept_sentences(c: Comparison) -> Iterator[Sentence]:
    """The same where each run ends at the step that its own held-out accuracy chooses."""
    ours = compass.keep_best(c.tests("orpo"))
    gain, follows = c.estimate(ours, KEPT), c.estimate(ours, KEPT, "follows")
    leads = {OBJECTIVES[name].label: c.lead(ours, KEPT, compass.keep_best(c.tests(name)), KEPT) for name in OTHERS}
    said = ", ".join(f"{lead:{c.signed}} over {label}" for label, lead in leads.items())
    yield (
        f"with `--keep_best`, where each run keeps the step with its highest held-out accuracy, ORPO gains"
        f" {gain:{c.signed}}, {follows:.2f} of its images show what was asked, and its leads are {said}"
        f" ([kept](#the-step-that-held-out-accuracy-keeps)).",
        c.keeps_less(follows) or any(lead.high < 0 for lead in leads.values()),
    )


def anchor(c: Comparison) -> str:
    return f"[table](#{TITLES[c.world]})"


def compass_sentences(c: Comparison) -> Iterator[Sentence]:
    """What choosing without drawing an image costs."""
    found, price = compass.points(c, "orpo"), compass.price(c, "orpo")
    if price:
        reached, best = price
        yield (
            f"over {len(found)} points of ORPO's search held-out accuracy correlates with the gain at"
            f" r = {compass.correlation(found):.2f}; choosing setting and step by it alone gets {reached.gain:{c.signed}} with"
            f" {reached.follows:.2f} of the images right, where the best that keeps to the prompt is {best:{c.signed}}"
            f" ([compass](#held-out-accuracy-is-the-compass)).",
            reached.gain < (1 - LOST) * best or reached.follows < c.needed,
        )


def long_sentences(c: Comparison) -> Iterator[Sentence]:
    """What training on does, at ORPO's own setting and at the beta that is recommended."""
    said, is_against = [], False
    for beta in sorted({c.choices["orpo"].experiment.strength, RECOMMENDED_BETA}):
        runs = c.tests("orpo", (LONG_MARK,), strength=beta)
        if len(runs) >= ENOUGH:
            gain, follows = c.estimate(runs, LONG_MARK), c.estimate(runs, LONG_MARK, "follows")
            best = max(c.estimate(runs, step).mean for step in runs[0].evaluations)
            said.append(
                f"{gain:{c.signed}} at beta {beta:g}, {gain.mean / best:.0%} of its best at any step, with {follows:.2f} of the images right"
            )
            is_against |= gain.mean < (1 - LOST) * best or c.keeps_less(follows)
    if said:
        yield (
            f"after {LONG_MARK:,} steps ORPO's gain is {'; '.join(said)} ([long runs](#ten-times-as-long)).",
            is_against,
        )


def flip_sentences(c: Comparison, cost: dict) -> Iterator[Sentence]:
    """What wrong labels do to ORPO, with and without a flatter sigmoid, and to Diffusion-DPO in the same time."""
    for flipped in sorted(FLIPS):
        theirs = c.tests_with("dpo", {"flipped": flipped})
        for name in ("orpo", "flat"):
            ours = c.tests_with("orpo", {"objective": name, "flipped": flipped})
            if not ours or not theirs or min(len(ours[1]), len(theirs[1])) < ENOUGH:
                continue
            (choice, runs), (their_choice, their_runs) = ours, theirs
            gain, lead = c.estimate(runs, choice.step), c.lead(runs, choice.step, their_runs, their_choice.step)
            yield (
                f"Prompt-following with {flipped:.0%} of the labels exchanged: {ALL_OBJECTIVES[name].label} gains {gain:+.2f}; its lead"
                f" over Diffusion-DPO is {flip_lead(c, cost, ours, theirs, 'dpo')} ([wrong labels](#wrong-labels)).",
                gain.low <= 0 or lead.low <= 0,
            )


def flat_sentences(worlds: dict[str, Comparison]) -> Iterator[Sentence]:
    """What a flatter sigmoid does at ORPO's own setting."""
    leads = {}
    for world, c in worlds.items():
        flat, ours = (c.tests("orpo", objective=name) for name in ("flat", "orpo"))
        if min(len(flat), len(ours)) >= ENOUGH:
            step = c.choices["orpo"].step
            leads[world] = c.lead(flat, step, ours, step)
    if leads:
        said = ", ".join(f"{lead:{worlds[world].signed}} ({TITLES[world]})" for world, lead in leads.items())
        yield (
            f"Without exchanged labels a temperature of {TEMPERATURE:g} changes ORPO's gain, at ORPO's own setting, by {said}"
            " ([temperature](#a-flatter-sigmoid)).",
            any(lead.high < 0 for lead in leads.values()),
        )


def vote_sentences(c: Comparison) -> Iterator[Sentence]:
    """What several votes on each pair are good for, against the majority's label."""
    for votes in VOTE_COUNTS:
        found = {name: c.tests_with("orpo", VOTED | {"objective": name, "votes": votes}) for name in VOTES}
        if any(each is None or len(each[1]) < ENOUGH for each in found.values()):
            continue
        choice, runs = found.pop("majority")
        leads = {
            VOTES[name].label: c.lead(theirs, their.step, runs, choice.step) for name, (their, theirs) in found.items()
        }
        said = ", ".join(f"{label} {lead:+.2f}" for label, lead in leads.items())
        yield (
            f"{votes} votes on each pair, gain over training on the majority's label: {said} ([votes](#votes-instead-of-labels)).",
            False,
        )


def earlier_sentence(earlier: dict[str, Earlier]) -> str:
    leads = ", ".join(f"{e.lead('earlier'):+.3f} ({TITLES[world]})" for world, e in earlier.items())
    return (
        f"The earlier public formula is no better than fine-tuning on the winners. Its lead, 200 steps: {leads}"
        " ([earlier formula](#the-earlier-formula))."
    )


def cost_sentence(cost: dict) -> str:
    time, memory = cost["orpo"]["time"] / cost["dpo"]["time"], cost["orpo"]["memory"] / cost["dpo"]["memory"]
    return f"A step of ORPO takes {time:.2f} of Diffusion-DPO's time and {memory:.2f} of its memory ([cost](#cost))."
