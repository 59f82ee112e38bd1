"""One process's batches from shards: read, decoded in workers, and counted, so that a resumed run knows where to go on."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader

from ..pairs.order import BatchOrder, position_of
from ..runtime.signals import shield_worker
from .decoder import PairDecoder, collate
from .order import ORDER_VERSION, Share, count_lanes
from .reader import Arrival, ReadAhead, read_share
from .tolerance import Tolerance


@dataclass
class ShardBatches:
    """Endless batches of one process, which know their position.

    Attributes:
        data: the source.
        order: of the batches of all processes, as far as they are given.
        seed, rank, world_size: as for `training_batches`.
        problems: for the progress bar: different bad samples that this process has met.
    """

    data: "ShardData"  # noqa: F821
    order: BatchOrder
    seed: int
    rank: int
    world_size: int
    problems: dict[str, int] = field(default_factory=dict)

    def __iter__(self) -> Iterator[dict]:
        data, bad = self.data, set()
        tolerance = Tolerance(data.shards, data.num_pairs / self.world_size, data.max_bad_samples)
        for batch in self._loader():
            for problem in batch.pop("problems"):
                tolerance.count(problem)
                bad.add((problem.shard, problem.ordinal))
            self.problems = {"bad": len(bad)} if bad else {}
            self.order.skip(self.world_size)
            yield batch

    def _loader(self) -> DataLoader:
        data, batches = self.data, self._arrivals()
        return DataLoader(
            PairDecoder(data.shards, data.pairs, data.buckets, data.transform, self.seed),
            batch_sampler=ReadAhead(batches, data.num_workers) if data.num_workers else batches,
            collate_fn=collate,
            num_workers=data.num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=shield_worker,
            generator=torch.Generator(),  # or it would draw from the global one, which LoRA dropout uses
        )

    def _arrivals(self) -> Iterator[list[Arrival]]:
        data, batch_size = self.data, self.order.batch_size
        if len(data.transform.shapes) > 1:
            order = data.order(batch_size, self.seed, self.position)
            return data.reader(self.seed).batches(order, self.rank, self.world_size)
        lanes = count_lanes(sum(len(pairs) > 0 for pairs in data.pairs))
        share = Share(data.num_pairs, lanes, batch_size, self.rank, self.world_size, sum(self.order.given))
        return read_share(data.shards, data.pairs, self.seed, data.buffer_size, share)

    @property
    def position(self) -> dict:
        """For the checkpoint: valid for any number of processes and workers, and any batch size."""
        return {
            "order": ORDER_VERSION,
            "shuffle_buffer_size": self.data.buffer_size,
        } | position_of(self.order.given, self.data.transform.shapes)


def check_position(position: dict, buffer_size: int) -> None:
    """Stops where another run's batches came in another order, so that some pairs would be repeated and some lost.

    Raises:
        ValueError: says what differs.
    """
    if position.get("order") != ORDER_VERSION:
        raise ValueError(
            "Cannot resume the stream of shards: another version of these scripts saved this checkpoint, and read"
            " shards in another order. Finish the run with that version, or start a new one."
        )
    if position["shuffle_buffer_size"] != buffer_size:
        raise ValueError(
            f"Cannot resume the stream of shards: --shuffle_buffer_size was {position['shuffle_buffer_size']} and is"
            f" now {buffer_size}. Continue with the same."
        )
