"""How much a run trains, and how far it is: what --num_train_epochs and --max_train_steps come down to."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Amount:
    """What a run is to do, counted in steps or in pairs.

    Epochs are passes over the pairs, whatever batch size, accumulation or number of processes a resumed run has: what
    remains follows from the pairs seen. The learning rate's course is laid out in the steps that the run began with.

    Attributes:
        max_train_steps: as given, or None: then epochs count.
        pairs: that all epochs have, with what fills the last batches of this run's size.
        pairs_per_step: of this run.
        first_pairs_per_step: of the run that the first checkpoint came from; this one's, unless it is resumed.
        first_pairs: as `pairs`, with that run's batch size.
    """

    max_train_steps: int | None
    pairs: int
    pairs_per_step: int
    first_pairs_per_step: int
    first_pairs: int

    def last_step(self, global_step: int, pairs_seen: int) -> int:
        """The step at which the run is done, seen from a place in it."""
        if self.max_train_steps is not None:
            return self.max_train_steps
        return global_step + max(0, math.ceil((self.pairs - pairs_seen) / self.pairs_per_step))

    @property
    def horizon(self) -> int:
        """Steps that the learning rate's course is laid out for."""
        return self.max_train_steps or math.ceil(self.first_pairs / self.first_pairs_per_step)

    def place(self, global_step: int, pairs_seen: int) -> float:
        """How far the run is, in the horizon's steps."""
        return global_step if self.max_train_steps is not None else pairs_seen / self.first_pairs_per_step
