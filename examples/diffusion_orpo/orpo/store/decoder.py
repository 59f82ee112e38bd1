"""The workers' part: they decode the pairs that the reader hands them, and find a stand-in for each bad one.

Whether an image can be decoded is known only now, when the pair has its place in a batch, on one process. The other
processes don't know, and the batch must not be short. So another pair takes the place: one among the first of any shard,
chosen by seed, epoch and the bad sample's number, so that it is the same however many processes and workers there are. It is
read afresh, which costs opening a shard.
"""

from dataclasses import dataclass, replace

import numpy as np
from torch.utils.data import Dataset

from ..pairs.bad_pair import BadPair
from ..pairs.pair import PairTransform, collate_pairs, sample_seed
from .encoded_sample import read_encoded
from .listing import Shards
from .order import Run
from .reader import Arrival, read_run
from .sample import to_pair


FIRST = 16  # of a shard that may stand in: from a URL or a command, everything before a sample has to be read
TRIES = 100


@dataclass(frozen=True)
class Problem:
    """A bad sample."""

    epoch: int
    shard: int
    ordinal: int
    bad: BadPair


def decode(shards: Shards, transform: PairTransform, arrival: Arrival, seed: int) -> dict:
    """Reads, decodes and transforms a sample. One that is encoded was transformed before.

    Args:
        shards: all of them.
        transform: of the images.
        arrival: the sample.
        seed: of everything random about it.

    Raises:
        BadPair: it can't be used; `where` names it.
    """
    where = shards.where(arrival.shard, arrival.ordinal, arrival.members)
    try:
        if arrival.members is None:
            raise BadPair("unreadable", "the shard ends or is cut off before it")
        if shards.encoding is not None:
            sample = read_encoded(shards.encoding, arrival.members, arrival.bucket, seed)
        else:
            pair = to_pair(arrival.members)
            sample = pair and transform(pair, arrival.bucket, seed, where)
        if sample is None:
            raise BadPair("unlisted tie", "it is a tie that the manifest does not list")
        return sample
    except BadPair as bad:
        raise BadPair(bad.kind, bad.problem, bad.where or where, bad.advice) from bad
    except ValueError as error:
        raise BadPair("undecodable image", str(error), where) from error


@dataclass(frozen=True)
class PairDecoder(Dataset):
    """Samples by their arrival: tensors, and the problem where they come from a stand-in.

    Attributes:
        shards: all of them.
        pairs: the places of the pairs to train on, for each shard.
        buckets: the numbers of the samples' shapes, for each shard.
        transform: for the images, where the shards hold any.
        seed: of transform and noise.
    """

    shards: Shards
    pairs: list[np.ndarray]
    buckets: list[np.ndarray]
    transform: PairTransform
    seed: int

    def __getitem__(self, arrival: Arrival) -> tuple[dict, Problem | None]:
        index = int(self.shards.counts[: arrival.shard].sum()) + arrival.ordinal  # in the listing of all shards
        seed = sample_seed(self.seed, arrival.epoch, index)
        try:
            return decode(self.shards, self.transform, arrival, seed), None
        except BadPair as bad:
            return self._stand_in(arrival, index, seed), Problem(arrival.epoch, arrival.shard, arrival.ordinal, bad)

    def _stand_in(self, arrival: Arrival, index: int, seed: int) -> dict:
        """Another pair in the same shape: images of any, encodings of the same bucket."""
        pairs = self.pairs
        if self.shards.encoding is not None:
            pairs = [places[of_shard[places] == arrival.bucket] for places, of_shard in zip(pairs, self.buckets)]
        candidates = [shard for shard, ordinals in enumerate(pairs) if len(ordinals)]
        rng = np.random.default_rng((self.seed, arrival.epoch, index, len(candidates)))
        for _ in range(TRIES):
            shard = int(rng.choice(candidates))
            run = Run(shard, rng.choice(pairs[shard][:FIRST], size=1))
            other = replace(next(read_run(self.shards, arrival.epoch, run)), bucket=arrival.bucket)
            try:
                return decode(self.shards, self.transform, other, seed)
            except BadPair:
                continue
        raise ValueError(
            f"No pairs to train on: {TRIES} pairs, chosen at random among the first {FIRST} of each shard, are all bad."
            " Check what made the shards: check_preferences.py says what is wrong with them."
        )


def collate(items: list[tuple[dict, Problem | None]]) -> dict:
    """A batch, as `collate_pairs` makes it, with `problems`: those of the samples that were replaced by a stand-in."""
    problems = [problem for _, problem in items if problem is not None]
    return collate_pairs([sample for sample, _ in items]) | {"problems": problems}
