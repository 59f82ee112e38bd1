"""How many bad samples a run tolerates."""

import logging
from collections import Counter

from ..runtime.redaction import without_secrets
from .decoder import Problem
from .listing import Shards


logger = logging.getLogger(__name__)


class Tolerance:
    """Counts and logs the bad samples of one process in each epoch, and stops it if there are too many.

    Args:
        shards: all of them.
        total: samples that the process reads in an epoch.
        max_bad_samples: the share of them that may be bad.
    """

    def __init__(self, shards: Shards, total: float, max_bad_samples: float) -> None:
        self.shards, self.total, self.max_bad_samples = shards, total, max_bad_samples
        self.epoch, self.counts = 0, Counter()

    def count(self, problem: Problem) -> None:
        """Counts one.

        Raises:
            ValueError: they are more than `max_bad_samples` allows; lists shards and kinds.
        """
        bad = problem.bad
        logger.warning(f"{bad.where}: {bad.kind}: {bad.problem}. Another pair takes its place")
        if problem.epoch != self.epoch:
            self.epoch, self.counts = problem.epoch, Counter()
        self.counts[without_secrets(self.shards.urls[problem.shard]), bad.kind] += 1
        if self.counts.total() > self.max_bad_samples * self.total:
            listing = "; ".join(f"{url}: {number} {kind}" for (url, kind), number in self.counts.most_common(10))
            raise ValueError(
                f"{self.counts.total()} of {round(self.total)} samples are bad, more than"
                f" --max_bad_samples={self.max_bad_samples}: {listing}. {bad.advice} Or allow more."
            )
