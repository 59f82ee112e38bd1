"""Tables of preference rows of which one is damaged, as hypothesis makes them up."""

import random

import hypothesis
import pyarrow as pa
from datasets import Dataset, disable_caching, disable_progress_bars, enable_caching, enable_progress_bars
from faults import samples
from faults.mutations import mutate
from hypothesis import strategies as st
from orpo.pairs.columns import Columns
from orpo.pairs.table import PairTable, PreferencePairs
from orpo.store.convert import read_pair


LABELS = st.one_of(
    st.sampled_from(["1", "0", "0.5", " 1.0\n", "yes", "nan", "", "-0.0", "1e400", "٠", "None"]),
    st.text(max_size=10),
    st.floats().map(str),
    st.none(),
)
CAPTIONS = st.one_of(st.none(), st.text(max_size=50), st.binary(max_size=20), st.just("x" * 10_000))
IMAGES = st.one_of(
    st.none(),
    st.binary(max_size=60),
    st.sampled_from(sorted(samples.images().values())),
    st.integers(0, 10**6).map(lambda number: damaged_image(number)),
)


def damaged_image(number: int) -> bytes:
    rng = random.Random(number)
    originals = list(samples.images().values())
    return mutate(rng.choice(originals), rng.choice(originals), "image", rng)


def check_rows(inputs: int, seed: int) -> int:
    """Runs the property on so many tables; returns how many it saw."""
    seen = 0

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(
        place=st.integers(0, 3), label=LABELS, caption=CAPTIONS, image=IMAGES, side=st.sampled_from("01")
    )
    def property_of_one(place, label, caption, image, side) -> None:
        nonlocal seen
        seen += 1
        one_damaged_row(place, label, caption, image, f"jpg_{side}")

    disable_caching()
    disable_progress_bars()
    try:
        property_of_one()
    finally:
        enable_caching()
        enable_progress_bars()
    return seen


def one_damaged_row(
    place: int, label: str | None, caption: str | bytes | None, image: bytes | None, side: str
) -> None:
    """The check of the dataset and the converter's own say the same of every row, and name the damaged one only."""
    rows = [row | {"label_0": str(row["label_0"])} for row in samples.rows()]
    rows[place] = rows[place] | {"label_0": label, "caption": caption, side: image}
    table = table_of(rows)
    verdicts = [verdict(table, i) for i in range(len(rows))]
    assert all(verdicts[i] is None for i in range(len(rows)) if i != place), verdicts
    try:
        data = PreferencePairs.of(PairTable.of(Dataset(table), "rows"))
        data.checked()
    except ValueError as error:
        assert f"row {place}" in str(error) and str(error).isprintable(), error
        assert verdicts[place] is not None, f"the converter takes it: {error}"
        return
    for i in range(len(data)):
        row, pair = rows[data.numbers[i]], data[i]
        images = (row["jpg_0"], row["jpg_1"]) if float(row["label_0"]) else (row["jpg_1"], row["jpg_0"])
        text = row["caption"].decode() if isinstance(row["caption"], bytes) else row["caption"]
        assert (pair.winner, pair.loser, pair.prompt) == (*images, text), f"row {data.numbers[i]} became another pair"
    is_tie = len(data) == len(rows) - 1
    assert is_tie and float(rows[place]["label_0"]) == 0.5 or len(data) == len(rows)
    assert is_tie or verdicts[place] is None, verdicts[place]


def table_of(rows: list[dict]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in ("jpg_0", "jpg_1", "label_0")}
    captions = [c.encode("utf-8", "surrogatepass") if isinstance(c, str) else c for c in (r["caption"] for r in rows)]
    raw = pa.array(captions, pa.binary())
    text = pa.StringArray.from_buffers(len(rows), raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    arrays = {
        name: pa.array(column, pa.string() if name == "label_0" else pa.binary()) for name, column in columns.items()
    }
    return pa.table(arrays | {"caption": text})


def verdict(table: pa.Table, row: int) -> str | None:
    """Why the converter refuses a row; None where it takes it."""
    try:
        cells = {name: table.column(name)[row] for name in table.column_names}
        read_pair(Columns.find(table.schema, "rows"), cells, f"row {row}")
    except ValueError as error:
        return str(error)
    return None
