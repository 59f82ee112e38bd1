"""Findings about preference pairs: counts, repetitions, lengths of prompts, and notes on what deserves a look."""

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import CheckConfig
from ..pairs.bad_pair import BadPair
from ..pairs.buckets import assign
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..runtime.shapes import shapes_of_area, square
from .inspection import InspectedPair, Key, digest


SHOWN = 5  # pairs that are named of each kind
PROMPTS_AT_ONCE = 1000
SHORTER_SIDES = (256, 512, 768, 1024, 1536, 2048)  # pixels
ASPECTS = (1 / 2, 2 / 3, 4 / 5, 0.95, 1 / 0.95, 5 / 4, 3 / 2, 2)  # width to height
MANY_PAIRS, MANY_SHARE = 10, 0.01  # of one image; more deserve a look
WORTH_BUCKETS = 0.05  # of the images' area, which buckets would keep
UNEVEN = 0.2  # share by which chosen images differ from rejected ones in something nobody meant to prefer
NO_LIMIT = 10**6  # transformers says 10^30 if a tokenizer's files name none
SIDES = ("chosen", "rejected")

# Type codes of `array`: 64 bits signed and unsigned, 16 bits unsigned.
COLUMNS = {
    **dict.fromkeys(("shard", "place"), "q"),
    **dict.fromkeys((*SIDES, "prompt"), "Q"),
    **dict.fromkeys(("chosen_width", "chosen_height", "rejected_width", "rejected_height"), "H"),
}


class Findings:
    """Counts pairs one after the other, in less than 100 bytes for each.

    Args:
        resolution: that training will resize to, in pixels.
        tokenizers: to measure prompts with, by name.
    """

    def __init__(self, resolution: int, tokenizers: dict[str, "PromptLengths"]) -> None:
        self.resolution, self.tokenizers = resolution, tokenizers
        self.rows = self.empty_prompts = 0
        self.labels: Counter[float | None] = Counter()
        self.problems: Counter[str] = Counter()
        self.first_problems: dict[str, list[BadPair]] = {}
        self.skipped: Counter[str] = Counter()  # files and images that training doesn't look at
        self.bad_keys: list[Key] = []
        self.formats: dict[str, Counter[str]] = {side: Counter() for side in SIDES}
        self._columns = {name: array(code) for name, code in COLUMNS.items()}  # of good pairs
        self._pairs_of_prompt: Counter[int] = Counter()  # by the prompt's hash, in the order they came
        self._unmeasured: list[str] = []

    def add(self, pair: InspectedPair) -> None:
        """Counts a pair."""
        self.rows += 1
        self.labels[pair.label] += 1
        for problem in pair.problems:
            self.add_problem(problem)
        if pair.problems:
            self.bad_keys.append(pair.key)
        elif pair.chosen is not None:
            self._add_good(pair)

    def add_problem(self, problem: BadPair) -> None:
        """Counts something that training refuses; the first ones of a kind are kept."""
        self.problems[problem.kind] += 1
        if self.problems[problem.kind] <= SHOWN:
            self.first_problems.setdefault(problem.kind, []).append(problem)

    def _add_good(self, pair: InspectedPair) -> None:
        chosen, rejected, prompt = pair.chosen, pair.rejected, digest(pair.prompt.encode())
        sizes = (chosen.width, chosen.height, rejected.width, rejected.height)
        for column, value in zip(self._columns.values(), (*pair.key, chosen.digest, rejected.digest, prompt, *sizes)):
            column.append(value)
        self.formats["chosen"][chosen.format] += 1
        self.formats["rejected"][rejected.format] += 1
        self.empty_prompts += not pair.prompt.strip()
        if prompt not in self._pairs_of_prompt:
            self._unmeasured.append(pair.prompt)
        self._pairs_of_prompt[prompt] += 1
        if len(self._unmeasured) == PROMPTS_AT_ONCE:
            self._measure_prompts()

    def _measure_prompts(self) -> None:
        for lengths in self.tokenizers.values() if self._unmeasured else ():
            lengths.add(self._unmeasured)
        self._unmeasured = []

    @property
    def good_keys(self) -> list[Key]:
        """The pairs that training can use."""
        return list(zip(self._columns["shard"], self._columns["place"]))

    def repeated_pairs(self) -> "RepeatedPairs":
        """Repetitions among the good pairs, by their places in `good_keys`."""
        return find_repeated(*(np.asarray(self._columns[name]) for name in (*SIDES, "prompt")))

    def summary(self, where: Callable[[Key], str]) -> dict:
        """All findings, ready for JSON.

        Args:
            where: names a pair in messages.
        """
        self._measure_prompts()
        pairs_of_prompt = np.array(list(self._pairs_of_prompt.values()), dtype=np.int64)
        found = {
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
                "tokens": {name: lengths.summary(pairs_of_prompt) for name, lengths in self.tokenizers.items()},
            },
            "images": self._images(),
            "repeated": self._repeated(where),
            "skipped": dict(self.skipped),
        }
        return found | {"notes": notes(found)}

    def _images(self) -> dict:
        # (sides, height and width, pairs)
        columns = [[self._columns[f"{side}_{name}"] for name in ("height", "width")] for side in SIDES]
        sizes = np.array(columns, dtype=np.int64)
        height, width = sizes[:, 0], sizes[:, 1]
        chosen_pixels, rejected_pixels = height * width
        shorter = sizes.min(axis=1)
        return {
            "formats": {side: dict(formats) for side, formats in self.formats.items()},
            "shorter_side": {"bounds": SHORTER_SIDES} | _histograms(shorter, SHORTER_SIDES),
            "aspect": {"bounds": ASPECTS} | _histograms(width / height, ASPECTS),
            "resolution": self.resolution,
            "enlarged": int((shorter < self.resolution).sum()),
            "cut_away": self._cut_away(sizes.transpose(2, 0, 1)),
            "chosen_has_more_pixels": int((chosen_pixels > rejected_pixels).sum()),
            "chosen_has_fewer_pixels": int((chosen_pixels < rejected_pixels).sum()),
        }

    def _cut_away(self, sizes: np.ndarray) -> dict[str, float]:
        """Share of the images' area that training cuts away, in squares and in aspect-ratio buckets; 0 without pairs."""
        squares = square(self.resolution)
        shapes = {"square": squares, "buckets": shapes_of_area(self.resolution) or squares}
        return {name: float(assign(sizes, some).cut.mean()) if len(sizes) else 0.0 for name, some in shapes.items()}

    def _repeated(self, where: Callable[[Key], str]) -> dict:
        keys, repeated = self.good_keys, self.repeated_pairs()

        def named(groups: list) -> dict:
            first = [[where(keys[i]) for i in group[:SHOWN]] for group in groups[:SHOWN]]
            return {"count": len(groups), "first": first}

        return {
            "duplicates": named(repeated.duplicates),
            "contradictions": named(repeated.contradictions),
            "identical_images": named([[index] for index in repeated.identical]),
            "different_images": repeated.num_images,
            "most_used_images": [
                {"pairs": n, "first": where(keys[index])} for n, index in repeated.most_used if n > 1
            ],
        }


def _histograms(values: np.ndarray, bounds: tuple[float, ...]) -> dict[str, list[int]]:
    """How many values of either side (2, pairs) lie below the first bound, between each two, and above the last one."""
    return {
        side: np.bincount(np.searchsorted(bounds, row, side="right"), minlength=len(bounds) + 1).tolist()
        for side, row in zip(SIDES, values)
    }


# Repetitions.


@dataclass(frozen=True)
class RepeatedPairs:
    """Repetitions, with each pair given by its place in the arrays.

    Attributes:
        duplicates: pairs that repeat an earlier one (same images, prompt and preference), with the earlier one.
        contradictions: groups of pairs with the same images and prompt, but different preferences.
        identical: pairs of an image with itself.
        num_images: different images.
        most_used: the images in most pairs: how many pairs, and the first of them.
    """

    duplicates: list[tuple[int, int]]
    contradictions: list[list[int]]
    identical: list[int]
    num_images: int
    most_used: list[tuple[int, int]]


def find_repeated(chosen: np.ndarray, rejected: np.ndarray, prompts: np.ndarray) -> RepeatedPairs:
    """Compares pairs by hashes.

    Args:
        chosen, rejected, prompts: uint64 (N,), a hash of each pair's images and prompt.
    """
    identical = chosen == rejected
    duplicates = [(group[0], index) for group in _groups(chosen, rejected, prompts) for index in group[1:]]
    first_image, second_image = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    contradictions = [
        group for group in _groups(first_image, second_image, prompts) if len(np.unique(chosen[group])) > 1
    ]
    images, first, counts = np.unique(
        np.concatenate([chosen, rejected[~identical]]), return_index=True, return_counts=True
    )
    pair_of = np.concatenate([np.arange(len(chosen)), np.flatnonzero(~identical)])
    most = np.argsort(-counts, kind="stable")[:5]
    return RepeatedPairs(
        sorted(duplicates, key=lambda pair: pair[1]),
        sorted(contradictions),
        np.flatnonzero(identical).tolist(),
        len(images),
        [(int(counts[i]), int(pair_of[first[i]])) for i in most],
    )


def _groups(*columns: np.ndarray) -> list[list[int]]:
    """Groups of two or more rows that are alike in all columns, each in order."""
    order = np.lexsort(columns)  # stable, so a group's rows stay in order
    rows = np.stack(columns, axis=1)[order]
    starts = np.flatnonzero(np.append(True, (rows[1:] != rows[:-1]).any(axis=1)))[: len(rows)]
    ends = np.append(starts[1:], len(rows))
    return [order[start:end].tolist() for start, end in zip(starts, ends) if end - start > 1]


# Lengths of prompts.


@dataclass
class PromptLengths:
    """Lengths of different prompts under one tokenizer.

    Attributes:
        tokenizer: of the pipeline.
        limit: tokens that the text encoder gets, including those that begin and end a text.
        lengths: tokens of each prompt, in the order they came.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    lengths: list[int] = field(default_factory=list)

    def add(self, prompts: list[str]) -> None:
        self.lengths += map(len, self.tokenizer(prompts, truncation=False, verbose=False)["input_ids"])

    def summary(self, pairs: np.ndarray) -> dict:
        """Limit, median and longest in tokens, and how many prompts are cut at their end.

        Args:
            pairs: int (N,), how many pairs have each prompt.
        """
        lengths = np.array(self.lengths)
        is_cut = lengths > self.limit
        return {
            "limit": self.limit if self.limit < NO_LIMIT else None,
            "median": float(np.median(lengths)) if len(lengths) else None,
            "longest": int(lengths.max()) if len(lengths) else None,
            "cut": int(is_cut.sum()),
            "share_of_pairs_cut": float(pairs[is_cut].sum() / max(1, pairs.sum())),
        }


def load_tokenizers(config: CheckConfig) -> dict[str, PromptLengths]:
    """The tokenizers of the pipeline in `--pretrained_model_name_or_path`, by their names in it.

    Raises:
        ValueError: they can't be loaded, or there are none.
    """
    from diffusers import DiffusionPipeline  # takes seconds, which a check without a pipeline doesn't need

    name, options = config.pretrained_model_name_or_path, {"revision": config.revision, "cache_dir": config.cache_dir}
    found = {}
    try:
        for key, value in DiffusionPipeline.load_config(name, **options).items():
            if key.startswith("tokenizer") and value[1] is not None:
                tokenizer = AutoTokenizer.from_pretrained(name, subfolder=key, **options)
                # CLIP's text encoders have as many positions as its tokenizer says; others take as many as the pipeline is told.
                told = None if "CLIP" in value[1] else config.max_sequence_length
                found[key] = PromptLengths(tokenizer, told or tokenizer.model_max_length)
    except (OSError, ValueError) as error:
        raise ValueError(f"--pretrained_model_name_or_path={name}: no tokenizers can be loaded: {error}") from error
    if not found:
        raise ValueError(f"--pretrained_model_name_or_path={name} is a pipeline without tokenizers: leave it out.")
    return found


# Notes.


def notes(found: dict) -> list[str]:
    """Notes on data that training accepts silently, but that somebody should look at before."""
    pairs, images, repeated = max(1, found["pairs"]), found["images"], found["repeated"]
    lines = [
        f"{tokens['share_of_pairs_cut']:.1%} of the pairs have a prompt longer than the {tokens['limit']} tokens of {name} (the"
        f" longest has {tokens['longest']}): the model won't see its end."
        for name, tokens in found["prompts"]["tokens"].items()
        if tokens["cut"]
    ]
    for kind, text in (
        (
            "contradictions",
            "Contradicting labels, the same images and prompt with either preferred: {}. Decide, or remove them.",
        ),
        ("duplicates", "Pairs that repeat an earlier one: {}. Training sees them more often than the others."),
        ("identical_images", "Pairs of an image with itself: {}. There is nothing to prefer."),
    ):
        if repeated[kind]["count"]:
            lines.append(text.format(repeated[kind]["count"]))
    most = repeated["most_used_images"][0]["pairs"] if repeated["most_used_images"] else 0
    if most >= MANY_PAIRS and most > MANY_SHARE * pairs:
        lines.append(f"One image appears in {most} of the {pairs} pairs: the model may memorize it.")
    if found["prompts"]["empty"]:
        lines.append(f"Pairs with an empty prompt: {found['prompts']['empty']}. They train the empty prompt.")
    if images["enlarged"]:
        lines.append(
            f"{images['enlarged'] / (2 * pairs):.1%} of the images are smaller than --resolution={images['resolution']}:"
            " they are enlarged, and look soft."
        )
    cut = images["cut_away"]
    if cut["square"] - cut["buckets"] > WORTH_BUCKETS:
        lines.append(
            f"A square crop cuts away {cut['square']:.0%} of the images' area, aspect-ratio buckets {cut['buckets']:.0%}: train"
            " with --aspect_ratio_buckets, unless what is at the edges decides nothing."
        )
    if found["skipped"]:
        lines.append(f"Skipped: {', '.join(f'{number} {name}' for name, number in found['skipped'].items())}.")
    return lines + _uneven_notes(pairs, images)


def _uneven_notes(pairs: int, images: dict) -> list[str]:
    """Notes on chosen images that can be told from rejected ones by the file alone: training may learn just that."""
    lines = []
    for name, chosen in images["formats"]["chosen"].items():
        rejected = images["formats"]["rejected"].get(name, 0)
        if chosen - rejected > UNEVEN * pairs:
            lines.append(
                f"{chosen / pairs:.0%} of the chosen and {rejected / pairs:.0%} of the rejected images are {name}: the model may"
                " learn the compression instead of the preference."
            )
    more, fewer = images["chosen_has_more_pixels"], images["chosen_has_fewer_pixels"]
    if abs(more - fewer) > UNEVEN * pairs:
        lines.append(
            f"The chosen image has more pixels than the rejected one in {more / pairs:.0%} of the pairs, fewer in"
            f" {fewer / pairs:.0%}: the model may learn sharpness instead of the preference."
        )
    return lines


def scorer_notes(scorers: dict) -> list[str]:
    """A note if no scorer sees the preference: there may be none to learn."""
    if any(agreement["low"] > 0.5 for agreement in scorers["scorers"].values()):
        return []
    return [
        "No scorer agrees with the labels more often than chance would: what they measure is not what was preferred, or the"
        " labels are noise, and teach nothing. Look at the pairs in index.html."
    ]
