"""Counts of a preference data set before training, and notes on what deserves a look."""

from array import array
from collections import Counter
from collections.abc import Callable

import numpy as np

from ..pairs.bad_pair import BadPair
from ..pairs.buckets import assign
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..runtime.shapes import shapes_of_area, square
from .inspection import InspectedPair, digest
from .prompt_lengths import PromptLengths
from .repeated_pairs import RepeatedPairs, find_repeated


SHOWN = 5  # rows that are named of each kind
BATCH = 1000  # prompts to measure at a time
SHORTER_SIDES = (256, 512, 768, 1024, 1536, 2048)  # pixels
ASPECTS = (1 / 2, 2 / 3, 4 / 5, 0.95, 1 / 0.95, 5 / 4, 3 / 2, 2)  # width to height
MANY_PAIRS, MANY_SHARE = 10, 0.01  # of one image; more deserve a look
WORTH_BUCKETS = 0.05  # of the images' area, which buckets would keep
UNEVEN = 0.2  # share by which winners differ from losers in something nobody meant to prefer

# Type codes of `array`: 64 bits signed and unsigned, 16 bits unsigned.
COLUMNS = {
    **dict.fromkeys(("shard", "place"), "q"),
    **dict.fromkeys(("winner", "loser", "prompt"), "Q"),
    **dict.fromkeys(("winner_width", "winner_height", "loser_width", "loser_height"), "H"),
}


class PreferenceReport:
    """Counts pairs one after the other, in less than 100 bytes for each.

    Args:
        resolution: that training will resize to, in pixels.
        tokenizers: to measure prompts with, by name.
    """

    def __init__(self, resolution: int, tokenizers: dict[str, PromptLengths]) -> None:
        self.resolution, self.tokenizers = resolution, tokenizers
        self.rows = self.empty_prompts = 0
        self.labels: Counter[float | None] = Counter()
        self.problems: Counter[str] = Counter()
        self.first_problems: dict[str, list[BadPair]] = {}
        self.passed_over: Counter[str] = Counter()  # files that training doesn't look at
        self.bad_keys: list[tuple[int, int]] = []
        self.formats: dict[str, Counter[str]] = {"winners": Counter(), "losers": Counter()}
        self._columns = {name: array(code) for name, code in COLUMNS.items()}  # of good pairs
        self._pairs_of_prompt: dict[int, int] = {}  # by the prompt's hash, in the order they came
        self._unmeasured: list[str] = []

    def add(self, pair: InspectedPair) -> None:
        """Counts a row or sample."""
        self.rows += 1
        self.labels[pair.label] += 1
        for problem in pair.problems:
            self.add_problem(problem)
        if pair.problems:
            self.bad_keys.append(pair.key)
        elif pair.winner is not None:
            self._add_good(pair)

    def add_problem(self, problem: BadPair) -> None:
        """Counts something that training refuses; the first ones of a kind are kept."""
        self.problems[problem.kind] += 1
        if self.problems[problem.kind] <= SHOWN:
            self.first_problems.setdefault(problem.kind, []).append(problem)

    def _add_good(self, pair: InspectedPair) -> None:
        winner, loser, prompt = pair.winner, pair.loser, digest(pair.prompt.encode())
        sizes = (winner.width, winner.height, loser.width, loser.height)
        for column, value in zip(self._columns.values(), (*pair.key, winner.digest, loser.digest, prompt, *sizes)):
            column.append(value)
        self.formats["winners"][winner.format] += 1
        self.formats["losers"][loser.format] += 1
        self.empty_prompts += not pair.prompt.strip()
        if prompt not in self._pairs_of_prompt:
            self._unmeasured.append(pair.prompt)
        self._pairs_of_prompt[prompt] = self._pairs_of_prompt.get(prompt, 0) + 1
        if len(self._unmeasured) == BATCH:
            self._measure_prompts()

    def _measure_prompts(self) -> None:
        for lengths in self.tokenizers.values() if self._unmeasured else ():
            lengths.add(self._unmeasured)
        self._unmeasured = []

    @property
    def good_keys(self) -> list[tuple[int, int]]:
        """Keys of the pairs that training can use."""
        return list(zip(self._columns["shard"], self._columns["place"]))

    def repeated_pairs(self) -> RepeatedPairs:
        """Repetitions among the good pairs, by their places in `good_keys`."""
        return find_repeated(*(np.asarray(self._columns[name]) for name in ("winner", "loser", "prompt")))

    def summary(self, where: Callable[[tuple[int, int]], str]) -> dict:
        """All counts, ready for JSON.

        Args:
            where: names a pair by its key.
        """
        self._measure_prompts()
        pairs_of_prompt = np.array(list(self._pairs_of_prompt.values()), dtype=np.int64)
        counts = {
            "rows": self.rows,
            "pairs": len(self._columns["place"]),
            "bad_rows": len(self.bad_keys),
            "labels": {
                "first_preferred": self.labels[1.0],
                "second_preferred": self.labels[0.0],
                "ties": self.labels[TIE],
                "low_agreement": self.labels[LOW_AGREEMENT],
                "bad": self.problems["bad label"] + self.problems["contradicting columns"],
            },
            "problems": [
                {
                    "kind": kind,
                    "count": count,
                    "first": [problem.summary for problem in self.first_problems[kind]],
                    "what_to_do": self.first_problems[kind][0].advice or None,
                }
                for kind, count in self.problems.most_common()
            ],
            "prompts": {
                "different": len(self._pairs_of_prompt),
                "empty": self.empty_prompts,
                "tokens": {name: found.summary(pairs_of_prompt) for name, found in self.tokenizers.items()},
            },
            "images": self._images(),
            "repeated": self._repeated(where),
            "passed_over": dict(self.passed_over),
        }
        return counts | {"notes": notes(counts)}

    def _images(self) -> dict:
        sizes = {name: np.asarray(column) for name, column in self._columns.items() if column.typecode == "H"}
        pixels = {
            side: sizes[f"{side}_width"].astype(np.int64) * sizes[f"{side}_height"] for side in ("winner", "loser")
        }
        shorter, aspect = (
            {f"{side}s": f(sizes[f"{side}_width"], sizes[f"{side}_height"]) for side in ("winner", "loser")}
            for f in (np.minimum, np.divide)
        )
        return {
            "formats": {side: dict(formats) for side, formats in self.formats.items()},
            "shorter_side": {"bounds": SHORTER_SIDES} | _histograms(shorter, SHORTER_SIDES),
            "aspect": {"bounds": ASPECTS} | _histograms(aspect, ASPECTS),
            "resolution": self.resolution,
            "enlarged": int(sum((sides < self.resolution).sum() for sides in shorter.values())),
            "cut_away": self._cut_away(sizes),
            "winner_has_more_pixels": int((pixels["winner"] > pixels["loser"]).sum()),
            "winner_has_fewer_pixels": int((pixels["winner"] < pixels["loser"]).sum()),
        }

    def _cut_away(self, sizes: dict[str, np.ndarray]) -> dict[str, float]:
        """Share of the images' area that training cuts away, in squares and in aspect-ratio buckets; 0 where there is no pair."""
        sides = [[sizes[f"{side}_height"], sizes[f"{side}_width"]] for side in ("winner", "loser")]
        pairs = np.array(sides).transpose(2, 0, 1).astype(np.int64)
        if len(pairs) == 0:
            return {"square": 0.0, "buckets": 0.0}
        shapes = {
            "square": square(self.resolution),
            "buckets": shapes_of_area(self.resolution) or square(self.resolution),
        }
        return {name: float(assign(pairs, of_name).cut.mean()) for name, of_name in shapes.items()}

    def _repeated(self, where: Callable[[tuple[int, int]], str]) -> dict:
        keys, repeated = self.good_keys, self.repeated_pairs()

        def named(groups: list) -> dict:
            return {
                "count": len(groups),
                "first": [[where(keys[i]) for i in group[:SHOWN]] for group in groups[:SHOWN]],
            }

        return {
            "duplicates": named(repeated.duplicates),
            "contradictions": named(repeated.contradictions),
            "identical_images": named([[index] for index in repeated.identical]),
            "different_images": repeated.num_images,
            "most_used_images": [
                {"pairs": n, "first": where(keys[index])} for n, index in repeated.most_used if n > 1
            ],
        }


def _histograms(sides: dict[str, np.ndarray], bounds: tuple[float, ...]) -> dict[str, list[int]]:
    """How many values of winners and losers lie below the first bound, between each two, and above the last one."""
    return {
        side: np.bincount(np.searchsorted(bounds, values, side="right"), minlength=len(bounds) + 1).tolist()
        for side, values in sides.items()
    }


def notes(counts: dict) -> list[str]:
    """Notes on data that training accepts silently, but that somebody should look at before."""
    pairs, images, repeated = max(1, counts["pairs"]), counts["images"], counts["repeated"]
    found = []
    for name, tokens in counts["prompts"]["tokens"].items():
        if tokens["cut"]:
            found.append(
                f"{tokens['share_of_pairs_cut']:.1%} of the pairs have a prompt longer than the {tokens['limit']} tokens of"
                f" {name} (the longest has {tokens['longest']}): the model won't see its end."
            )
    for kind, what in (
        (
            "contradictions",
            "Contradicting labels, the same images and prompt with either winner: {}. Decide, or remove them.",
        ),
        ("duplicates", "Pairs that repeat an earlier one: {}. Training sees them more often than the others."),
        ("identical_images", "Pairs of an image with itself: {}. There is nothing to prefer."),
    ):
        if repeated[kind]["count"]:
            found.append(what.format(repeated[kind]["count"]))
    most = repeated["most_used_images"][0]["pairs"] if repeated["most_used_images"] else 0
    if most >= MANY_PAIRS and most > MANY_SHARE * pairs:
        found.append(f"One image appears in {most} of the {pairs} pairs: the model may memorize it.")
    if counts["prompts"]["empty"]:
        found.append(f"Pairs with an empty prompt: {counts['prompts']['empty']}. They train the empty prompt.")
    if images["enlarged"]:
        found.append(
            f"{images['enlarged'] / (2 * pairs):.1%} of the images are smaller than --resolution={images['resolution']}:"
            " they are enlarged, and look soft."
        )
    cut = images["cut_away"]
    if cut["square"] - cut["buckets"] > WORTH_BUCKETS:
        found.append(
            f"A square crop cuts away {cut['square']:.0%} of the images' area, aspect-ratio buckets {cut['buckets']:.0%}: train"
            " with --aspect_ratio_buckets, unless what is at the edges decides nothing."
        )
    if counts["passed_over"]:
        listing = ", ".join(f"{number} {what}" for what, number in counts["passed_over"].items())
        found.append(f"Skipped: {listing}.")
    return found + _uneven_notes(pairs, images)


def _uneven_notes(pairs: int, images: dict) -> list[str]:
    """Notes on winners that can be told from losers by the file alone: training may learn just that."""
    found = []
    for name, winners in images["formats"]["winners"].items():
        losers = images["formats"]["losers"].get(name, 0)
        if winners - losers > UNEVEN * pairs:
            found.append(
                f"{winners / pairs:.0%} of the winners and {losers / pairs:.0%} of the losers are {name}: the model may"
                " learn the compression instead of the preference."
            )
    more, fewer = images["winner_has_more_pixels"], images["winner_has_fewer_pixels"]
    if abs(more - fewer) > UNEVEN * pairs:
        found.append(
            f"The winner has more pixels than the loser in {more / pairs:.0%} of the pairs, fewer in {fewer / pairs:.0%}:"
            " the model may learn sharpness instead of the preference."
        )
    return found


def scorer_notes(scorers: dict) -> list[str]:
    """A note if no scorer sees the preference: there may be none to learn."""
    if any(found["low"] > 0.5 for found in scorers["scorers"].values()):
        return []
    return [
        "No scorer agrees with the labels more often than chance would: what they judge is not what was preferred, or the"
        " labels are noise, and teach nothing. Look at the contact sheet."
    ]
