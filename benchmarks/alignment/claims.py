""" "In short": sentences made from the stored results, what goes against ORPO first. A sentence appears when its runs exist."""

from collections.abc import Iterator

import compass
from comparison import TITLES, Comparison
from first import First
from objectives import OBJECTIVES, VOTES
from plan import LONG_MARK, SEEDS, VOTE_COUNTS


ENOUGH = 3  # seeds of every objective before a comparison on test images is spoken of
OTHERS = [name for name in OBJECTIVES if name != "orpo"]


def is_compared(c: Comparison) -> bool:
    return all(len(c.tests(name)) >= ENOUGH for name in OBJECTIVES)


def in_short(worlds: dict[str, Comparison], first: dict[str, First], cost: dict) -> str:
    """A list of sentences, each with the heading under which its table stands."""
    against, rest = [], []
    for world, c in worlds.items():
        for sentence, is_against in comparison_sentences(c) if is_compared(c) else search_sentences(c):
            (against if is_against else rest).append(f"{TITLES[world].capitalize()}: {sentence}")
    against += first_against(first, worlds)
    rest += vote_sentences(worlds["prompt"])
    rest += [*first_for(first, worlds), *compass_sentences(worlds), *long_sentences(worlds), cost_sentence(cost)]
    return "\n".join(f"- {sentence}" for sentence in (status(worlds), *against, *rest))


def status(worlds: dict[str, Comparison]) -> str:
    done = [TITLES[world] for world, c in worlds.items() if all(len(c.tests(n)) == len(SEEDS) for n in OBJECTIVES)]
    if len(done) == len(worlds):
        return f"The comparison is complete: {len(SEEDS)} seeds of every objective in every world."
    complete = f"complete for {' and '.join(done)} only" if done else "not complete in any world yet"
    begun = [f"{TITLES[world]}, {seeds(c)} seeds of {len(SEEDS)}" for world, c in worlds.items() if is_compared(c)]
    other = f" It has test images in {'; '.join(begun)}; elsewhere" if begun else " Until it is,"
    return (
        f"**The comparison on equal footing is {complete}** ([what there is](#what-there-is-so-far)).{other} results on"
        f" test images come from [the first comparison](#the-first-comparison), whose flaws are named there."
    )


def seeds(c: Comparison) -> int:
    """Seeds on test images that every objective has."""
    return min(len(c.tests(name)) for name in OBJECTIVES)


def comparison_sentences(c: Comparison) -> Iterator[tuple[str, bool]]:
    """Who is ahead on test images, each at its own best."""
    ours, step = c.tests("orpo"), c.choices["orpo"].step
    follows = c.estimate(ours, step, "follows")
    yield (
        f"ORPO gains {c.estimate(ours, step):+.2f}, and {follows:.2f} of its images show what was asked ({anchor(c)}).",
        False,
    )
    for name in OTHERS:
        lead = c.lead(ours, step, c.tests(name), c.choices[name].step)
        what = OBJECTIVES[name].label
        if lead.high < 0:
            yield (
                f"**{what} is ahead of ORPO** by {-lead.mean:.2f} [{-lead.high:.2f}, {-lead.low:.2f}] ({anchor(c)}).",
                True,
            )
        elif lead.low <= 0:
            yield f"ORPO is within noise of {what}: {lead:+.2f} ({anchor(c)}).", True
        else:
            yield f"ORPO is ahead of {what} by {lead:.2f} ({anchor(c)}).", False
    yield kept_sentence(c)


def kept_sentence(c: Comparison) -> tuple[str, bool]:
    """The same where each run ends at the step that its own held-out accuracy chooses, and whether it goes against ORPO."""
    ours = compass.keep_best(c.tests("orpo"))
    gain, follows = c.estimate(ours, compass.KEPT), c.estimate(ours, compass.KEPT, "follows")
    leads = {
        OBJECTIVES[name].label: c.lead(ours, compass.KEPT, compass.keep_best(c.tests(name)), compass.KEPT)
        for name in OTHERS
    }
    said = ", ".join(f"{lead:+.2f} over {label}" for label, lead in leads.items())
    sentence = (
        f"with `--keep_best`, where each run keeps the step with its highest held-out accuracy, ORPO gains {gain:+.2f},"
        f" {follows:.2f} of its images show what was asked, and its leads are {said}"
        f" ([kept](#the-step-that-held-out-accuracy-keeps))."
    )
    return sentence, any(lead.high < 0 for lead in leads.values())


def anchor(c: Comparison) -> str:
    return f"[table](#{TITLES[c.world]})"


def search_sentences(c: Comparison) -> Iterator[tuple[str, bool]]:
    """What the search has found, once it has ended: validation images."""
    if not all(c.finished.values()):
        return  # one setting of each says nothing
    found = []
    for name in sorted(filter(c.choices.get, OBJECTIVES), key=lambda name: -c.choices[name].reward):
        choice, tried = c.choices[name], len(c.settings(name))
        found.append(
            f"{OBJECTIVES[name].label} {c.gain(choice.run, choice.step):+.2f} with {choice.run.mean(choice.step, 'follows'):.2f} of the images"
            f" right, the best of {tried} settings"
        )
    yield (
        f"where each objective gets its own rate and steps (validation images, three seeds): {'; '.join(found)}"
        f" ([search](#the-search-{TITLES[c.world]})). A lead at 200 steps is not a lead there.",
        True,
    )


def first_against(first: dict[str, First], worlds: dict[str, Comparison]) -> Iterator[str]:
    """What the first comparison says of worlds that have no other."""
    digits, smile = first["digits"], first["smile"]
    source = "[first comparison](#the-first-comparison)"
    if not is_compared(worlds["digits"]):
        yield (
            f"Digits, 200 steps: ORPO's gain of {digits.gain('orpo'):+.3f} is bought with prompt-following: {digits.follows('orpo'):.2f}"
            f" of its images show what was asked, {digits.follows('dpo'):.2f} of Diffusion-DPO's and {digits.base_follows:.2f} of the"
            f" base's. No claim to be ahead there holds ({source})."
        )
    if not is_compared(worlds["smile"]):
        yield (
            f"Smile, 200 steps: ORPO is within noise of the scaled margin, {smile.lead('orpo', 'scaled'):+.2f}, and at that setting"
            f" {1 - smile.follows('orpo'):.0%} of its images no longer show what was asked ({source})."
        )


def first_for(first: dict[str, First], worlds: dict[str, Comparison]) -> Iterator[str]:
    source = "[first comparison](#the-first-comparison)"
    leads = ", ".join(f"{f.lead('earlier', 'sft'):+.3f} ({TITLES[world]})" for world, f in first.items())
    yield f"The earlier formula is no better than fine-tuning on the winners. Its lead, 200 steps: {leads} ({source})."
    prompt = first["prompt"]
    if not is_compared(worlds["prompt"]):
        yield (
            f"Prompt-following, 200 steps: ORPO gains {prompt.lead('orpo', 'dpo'):.2f} more than Diffusion-DPO and"
            f" {prompt.lead('orpo', 'sft'):.2f} more than fine-tuning ({source})."
        )


def compass_sentences(worlds: dict[str, Comparison]) -> Iterator[str]:
    for world, c in worlds.items():
        found, price = compass.points(c, "orpo"), compass.price(c, "orpo")
        if price and len(found) >= 12:
            reached, best = price
            yield (
                f"{TITLES[world].capitalize()}: held-out accuracy correlates with the gain at r = {compass.correlation(found):.2f}"
                f" over {len(found)} points of ORPO's search{'' if c.finished['orpo'] else ', which has not ended'}; choosing setting and step by it alone gets {reached:+.2f} of"
                f" {best:+.2f}, which is {1 - reached / best:.0%} less ([compass](#held-out-accuracy-is-the-compass))."
            )


def vote_sentences(c: Comparison) -> Iterator[str]:
    """What several votes on each pair are good for, against the majority's label."""
    for votes in VOTE_COUNTS:
        found = {name: c.tests_with("orpo", {"objective": name, "votes": votes}) for name in VOTES}
        if any(each is None or len(each[1]) < ENOUGH for each in found.values()):
            continue
        choice, runs = found.pop("majority")
        leads = {
            VOTES[name].label: c.lead(theirs, their.step, runs, choice.step) for name, (their, theirs) in found.items()
        }
        said = ", ".join(f"{label} {lead:+.2f}" for label, lead in leads.items())
        yield f"{votes} votes on each pair, gain over training on the majority's label: {said} ([votes](#votes-instead-of-labels))."


def long_sentences(worlds: dict[str, Comparison]) -> Iterator[str]:
    for world, c in worlds.items():
        runs = c.tests("orpo", (LONG_MARK,))
        if len(runs) >= ENOUGH:
            gain, follows = c.estimate(runs, LONG_MARK), c.estimate(runs, LONG_MARK, "follows")
            yield (
                f"{TITLES[world].capitalize()}: after {LONG_MARK:,} steps ORPO's gain is {gain:+.2f}, and {follows:.2f} of its"
                f" images show what was asked ([long runs](#ten-times-as-long))."
            )


def cost_sentence(cost: dict) -> str:
    time, memory = cost["orpo"]["time"] / cost["dpo"]["time"], cost["orpo"]["memory"] / cost["dpo"]["memory"]
    return f"A step of ORPO takes {time:.2f} of Diffusion-DPO's time and {memory:.2f} of its memory ([cost](#cost))."
