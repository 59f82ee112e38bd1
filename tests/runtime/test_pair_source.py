"""Both sources of pairs have what training asks of one."""

import inspect

import pytest
from orpo.data.dataset import PairBatches, PreferenceData
from orpo.runtime.pair_source import Batches, PairSource
from orpo.store.stream import ShardBatches, ShardData


@pytest.mark.parametrize(
    "protocol, kind",
    [(PairSource, PreferenceData), (PairSource, ShardData), (Batches, PairBatches), (Batches, ShardBatches)],
)
def test_the_sources_have_the_members_of_their_protocol(protocol, kind):
    for name, member in vars(protocol).items():
        if name.startswith("_") and name != "__iter__" or name == "_abc_impl":
            continue
        own = getattr(kind, name)
        assert isinstance(own, property) == isinstance(member, property), name
        if inspect.isfunction(member):
            assert list(inspect.signature(own).parameters) == list(inspect.signature(member).parameters), name
    for name in protocol.__annotations__:
        assert name in kind.__dataclass_fields__ or hasattr(kind, name), name
