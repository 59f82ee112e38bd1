"""Inspects a whole data set, or all samples of shards, and writes the findings."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL.Image import Image
from tqdm.auto import tqdm

from ..config import CheckConfig
from ..pairs.dataset import DataOptions, load_pairs
from ..pairs.folders import is_pair_folders, read_pair_folders
from ..pairs.image import decode_image
from ..pairs.pair import PairTransform, PreferencePair
from ..pairs.sources import LISTED, as_given
from ..pairs.table import PairTable
from ..runtime.redaction import without_secrets
from ..store.index import find_shards
from ..store.stream import ShardData
from .contact_sheet import contact_sheet
from .filtering import write_filtered
from .inspection import PairSource, inspect_all
from .prompt_lengths import load_tokenizers
from .report import PreferenceReport, scorer_notes
from .sources import STOPS, RowSource, ShardSource
from .text import render


SHARD_MEMBERS = ["original_prompt.txt", "jpg_0.*", "jpg_1.*", "label_0.txt"]


# Says how often each scorer agrees with the labels. A pair is the preferred image, the other one, and their prompt.
Judge = Callable[[Iterator[tuple[Image, Image, str]]], dict]


def check(config: CheckConfig, judge: Judge | None = None) -> int:
    """Looks at all pairs that the flags name, prints what there is to say, and writes report.json and contact_sheet.png.

    Args:
        config: what to look at, and what to write.
        judge: the scorers that they name.

    Returns:
        The exit status: 0 where training would accept the data, 1 where not.
    """
    try:
        tokenizers = load_tokenizers(config) if config.pretrained_model_name_or_path else {}
    except ValueError as error:
        sys.exit(f"check_preferences.py: {error}")
    counts = PreferenceReport(config.resolution, tokenizers)
    report, source = check_rows(config, counts) if config.dataset_name else check_shards(config, counts)
    if judge is not None and counts.good_keys:
        keys = draw(counts.good_keys, config.num_scored_pairs or len(counts.good_keys))
        report["scorers"] = judge(_decoded(tqdm(source.pairs(keys), total=len(keys), desc="Scoring", unit="pair")))
        report["notes"] += scorer_notes(report["scorers"])
    if config.filter is not None and counts.good_keys:
        report["filtered"] = write_filtered(config.filter, source, counts)
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))
    if source is not None and config.num_sample_pairs and counts.good_keys:
        write_contact_sheet(config, source, counts.good_keys, report["data"])
    return 0 if report["accepted"] else 1


def check_rows(config: CheckConfig, counts: PreferenceReport) -> tuple[dict, RowSource | None]:
    """Lets training's own loading judge a data set, then looks at its rows.

    Images that training's loading has decoded are not decoded again; datasets' cache remembers them for training itself.

    Returns:
        The report, and the rows, or None where there are none that can be looked at.
    """
    options = DataOptions.from_config(config)
    try:
        load_pairs(options)
        reason = None
    except (ValueError, OSError) as error:
        reason = str(error)
    report = {"data": config.dataset_name, "accepted": reason is None, "reason": reason}
    max_pairs = None if config.max_train_samples is None else config.max_train_samples + options.num_held_out
    try:
        source = RowSource(_open_table(options, counts), max_pairs, decode=reason is not None)
    except (ValueError, OSError):
        return report, None  # reported as the reason
    _count(source, counts, config.workers)
    names, used = source.table.dataset.column_names, source.table.columns.needed
    columns = {
        "used": [column for column in names if column in used],
        "unused": [column for column in names if column not in used],
        "types": {column: str(feature) for column, feature in source.table.dataset.features.items()},
    }
    return report | {"columns": columns} | counts.summary(source.where), source


def _open_table(options: DataOptions, counts: PreferenceReport) -> PairTable:
    """All rows; of folders also those that stand beside others which training refuses."""
    folder = as_given(options.name)
    if not is_pair_folders(folder):
        table = options.open_table()
        if table.alone:
            counts.passed_over["images without another one to compare with"] = table.alone
        return table
    found = read_pair_folders(Path(folder))
    counts.passed_over = found.passed_over
    for problem in found.problems:
        counts.add_problem(problem)
    return PairTable.of(found.dataset(options.cache_dir), options.name, files=LISTED, reading=options.reading)


def check_shards(config: CheckConfig, counts: PreferenceReport) -> tuple[dict, ShardSource | None]:
    """Looks at all samples of shards, and judges them as a training process without workers does.

    Returns:
        The report, and the samples, or None where no shards are found.
    """
    report = {"data": " ".join(map(without_secrets, config.dataset_path))}
    try:
        source = ShardSource(find_shards(list(config.dataset_path), config.cache_dir))
    except (ValueError, OSError) as error:
        return report | {"accepted": False, "reason": str(error)}, None
    if source.shards.encoding is not None:
        print(f"{report['data']} holds latents, not images: check what it was made of instead.", file=sys.stderr)
        sys.exit(2)
    _count(source, counts, config.workers)
    reason = _why_shards_are_refused(config, source, counts)
    report |= {"accepted": reason is None, "reason": reason, "columns": {"used": SHARD_MEMBERS, "unused": []}}
    report |= counts.summary(source.where)
    worst, share = source.worst_shard(counts.bad_keys)
    if share > config.max_bad_samples:
        report["notes"].append(
            f"{share:.1%} of the samples of {worst} are bad. Each process judges its own part: one that reads mostly this"
            " shard stops the run. Replace it, or raise --max_bad_samples."
        )
    return report, source


def _why_shards_are_refused(config: CheckConfig, source: ShardSource, counts: PreferenceReport) -> str | None:
    held_out = config.num_held_out
    transform = PairTransform.from_config(config)
    training = ShardData(
        source.shards, held_out, transform, 0, 1, config.max_bad_samples, config.max_train_samples
    ).pairs
    total = sum(map(len, training))
    if total == 0:
        return f"No pairs are left to train on, after {source.shards.num_ties} ties and {held_out} held out."
    if counts.problems[STOPS]:
        return str(counts.first_problems[STOPS][0])
    trained = {(shard, int(ordinal)) for shard, ordinals in enumerate(training) for ordinal in ordinals}
    bad, good = (sum(key in trained for key in keys) for keys in (counts.bad_keys, counts.good_keys))
    if bad > config.max_bad_samples * total:
        return (
            f"{bad} of {total} samples are bad, more than --max_bad_samples={config.max_bad_samples}: replace them, or"
            " allow more."
        )
    return None if good else "All samples are bad. Check what made the shards."


def _count(source: PairSource, counts: PreferenceReport, num_workers: int) -> None:
    for pair in tqdm(inspect_all(source, num_workers), total=len(source), desc="Looking at pairs", unit="pair"):
        counts.add(pair)


def draw(keys: list, number: int) -> list:
    """So many of the keys, the same ones each time, in their order."""
    return [keys[i] for i in sorted(np.random.default_rng(0).choice(len(keys), min(number, len(keys)), replace=False))]


def _decoded(pairs: Iterable[PreferencePair]) -> Iterator[tuple[Image, Image, str]]:
    for pair in pairs:
        yield decode_image(pair.winner, "winner"), decode_image(pair.loser, "loser"), pair.prompt


def write_contact_sheet(config: CheckConfig, source: PairSource, keys: list, title: str) -> None:
    """Draws some of the pairs with these keys, the same ones each time."""
    chosen = draw(keys, config.num_sample_pairs)
    sheet = contact_sheet([(source.where(key), source.pair(key)) for key in chosen], title)
    sheet.save(config.output_dir / "contact_sheet.png")
    print(f"\nLook at {len(chosen)} of the pairs: {config.output_dir / 'contact_sheet.png'}")
