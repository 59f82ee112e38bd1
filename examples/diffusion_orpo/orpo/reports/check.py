"""Checks a whole dataset, or all samples of shards, and writes the findings."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL.Image import Image
from tqdm.auto import tqdm

from ..config import CheckConfig
from ..pairs.dataset import DataOptions, load_pairs
from ..pairs.folders import is_pair_folders, read_pair_folders
from ..pairs.image import decode_image
from ..pairs.labels import LOW_AGREEMENT, TIE
from ..pairs.pair import PairTransform, PreferencePair
from ..pairs.sources import LISTED, as_given
from ..pairs.table import PairTable, write_pairs
from ..runtime.durable import write_text
from ..runtime.redaction import without_secrets
from ..scoring.win_rate import LabelAgreement
from ..store.index import find_shards
from ..store.stream import ShardData
from .check_report import check_page, summary
from .findings import Findings, load_tokenizers, scorer_notes
from .inspection import STOPS, Key, ShardSource, Source, TableSource, inspect_all


SHARD_MEMBERS = ["original_prompt.txt", "jpg_0.*", "jpg_1.*", "label_0.txt"]
VOTES = ("votes_0", "votes_1")


def check(config: CheckConfig) -> int:
    """Looks at all pairs that the flags name, prints a summary, and writes report.json and index.html.

    Returns:
        The exit status: 0 where training would accept the data, 1 where not.

    Raises:
        ValueError: tokenizers or scorers can't be loaded; or a scorer fails, after all else is written.
    """
    agreement = LabelAgreement(config.scorers) if config.scorers else None
    findings = Findings(config.resolution, load_tokenizers(config) if config.pretrained_model_name_or_path else {})
    report, source = check_rows(config, findings) if config.dataset_name else check_shards(config, findings)
    good, failure = findings.good_keys, None
    if config.filter is not None and good:
        report["filtered"] = write_filtered(config.filter, source, findings)
    _write(config, report, source, good)
    if agreement is not None and good:
        keys = sample(good, config.num_scored_pairs or len(good))
        try:
            with tqdm(source.pairs(keys), "Scoring", len(keys), unit="pair") as bar:
                report["scorers"] = agreement(_decoded(bar))
            report["notes"] += scorer_notes(report["scorers"])
        except ValueError as error:
            failure = error
            report["notes"].append(f"Agreement with the labels was not measured. {error}")
        _write(config, report, source, good)
    print(summary(report), f"As a page: {config.output_dir / 'index.html'}", sep="\n\n")
    if failure is not None:
        raise failure
    return 0 if report["accepted"] else 1


def check_rows(config: CheckConfig, findings: Findings) -> tuple[dict, TableSource | None]:
    """Lets training's own loading decide about a dataset, then looks at its pairs.

    Images that training's loading has decoded are not decoded again; datasets' cache remembers them for training itself.

    Returns:
        The report, and the pairs, or None where there are none that can be looked at.
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
        source = TableSource(_open_table(options, findings), max_pairs, decode=reason is not None)
    except (ValueError, OSError):
        return report, None  # reported as the reason
    _inspect(source, findings, config.workers)
    names, used = source.table.dataset.column_names, source.table.columns.needed
    columns = {
        "used": [column for column in names if column in used],
        "unused": [column for column in names if column not in used],
        "types": {column: str(feature) for column, feature in source.table.dataset.features.items()},
    }
    return report | {"columns": columns} | findings.summary(source.where), source


def _open_table(options: DataOptions, findings: Findings) -> PairTable:
    """All pairs; of folders also those that stand beside others which training refuses."""
    folder = as_given(options.name)
    if not is_pair_folders(folder):
        table = options.open_table()
        if table.alone:
            findings.skipped["images without another one to compare with"] = table.alone
        return table
    found = read_pair_folders(Path(folder))
    findings.skipped = found.skipped
    for problem in found.problems:
        findings.add_problem(problem)
    return PairTable.of(found.dataset(options.cache_dir), options.name, files=LISTED, reading=options.reading)


def check_shards(config: CheckConfig, findings: Findings) -> tuple[dict, ShardSource | None]:
    """Looks at all samples of shards, and decides about them as a training process without workers does.

    Returns:
        The report, and the samples, or None where no shards are found.
    """
    report = {"data": " ".join(map(without_secrets, config.dataset_path))}
    transform = PairTransform.from_config(config)
    try:
        shards = find_shards(list(config.dataset_path), config.cache_dir)
    except (ValueError, OSError) as error:
        return report | {"accepted": False, "reason": str(error)}, None
    if shards.encoding is not None:
        print(f"{report['data']} holds latents, not images: check what it was made of instead.", file=sys.stderr)
        sys.exit(2)
    source = ShardSource(shards)
    _inspect(source, findings, config.workers)
    training = ShardData(
        shards, config.num_held_out, transform, 0, 1, config.max_bad_samples, config.max_train_samples
    ).pairs
    reason = _why_shards_are_refused(config, shards.num_ties, training, findings)
    report |= {"accepted": reason is None, "reason": reason, "columns": {"used": SHARD_MEMBERS, "unused": []}}
    report |= findings.summary(source.where)
    worst, share = source.worst_shard(findings.bad_keys)
    if share > config.max_bad_samples:
        report["notes"].append(
            f"{share:.1%} of the samples of {worst} are bad. Each process counts its own part: one that reads mostly this"
            " shard stops the run. Replace it, or raise --max_bad_samples."
        )
    return report, source


def _why_shards_are_refused(
    config: CheckConfig, num_ties: int, training: list[np.ndarray], findings: Findings
) -> str | None:
    total = sum(map(len, training))
    if total == 0:
        return f"No pairs are left to train on, after {num_ties} ties and {config.num_held_out} held out."
    if findings.problems[STOPS]:
        return str(findings.first_problems[STOPS][0])
    trained = {(shard, int(ordinal)) for shard, ordinals in enumerate(training) for ordinal in ordinals}
    bad, good = (sum(key in trained for key in keys) for keys in (findings.bad_keys, findings.good_keys))
    if bad > config.max_bad_samples * total:
        return (
            f"{bad} of {total} samples are bad, more than --max_bad_samples={config.max_bad_samples}: replace them, or"
            " allow more."
        )
    return None if good else "All samples are bad. Check what made the shards."


def _inspect(source: Source, findings: Findings, num_workers: int) -> None:
    for pair in tqdm(inspect_all(source, num_workers), "Looking at pairs", len(source), unit="pair"):
        findings.add(pair)


def write_filtered(folder: Path, source: Source, findings: Findings) -> dict:
    """Writes a copy with the good pairs that neither contradict nor repeat another one, each with its place in the source.

    Args:
        folder: gets `train.parquet`, with the chosen image as jpg_0, and the votes as shares, where there are any.
        source: the pairs.
        findings: about them.

    Returns:
        For the report: the file, how many pairs are in it, and how many were skipped for which reason.
    """
    repeated = findings.repeated_pairs()
    reasons = {
        "contradicting": {index for group in repeated.contradictions for index in group},
        "of an image with itself": set(repeated.identical),
        "duplicates": {index for _, index in repeated.duplicates},
    }
    skipped = {
        "ties": findings.labels[TIE],
        "of low agreement": findings.labels[LOW_AGREEMENT],
        "bad": len(findings.bad_keys),
    }
    out: set[int] = set()
    for reason, indices in reasons.items():
        skipped[reason] = len(indices - out)
        out |= indices
    keys = [key for index, key in enumerate(findings.good_keys) if index not in out]
    folder.mkdir(parents=True, exist_ok=True)
    votes = dict.fromkeys(VOTES, "float64") if source.has_votes else {}
    number = write_pairs(folder / "train.parquet", _rows(source, keys), {"source": "string"} | votes)
    return {"file": str(folder / "train.parquet"), "pairs": number, "skipped": skipped}


def _rows(source: Source, keys: list[Key]) -> Iterator[dict]:
    for key, pair in zip(keys, source.pairs(keys), strict=True):
        row = {"jpg_0": pair.winner, "jpg_1": pair.loser, "label_0": 1.0, "caption": pair.prompt}
        row["source"] = source.where(key)
        if source.has_votes:
            known = pair.agreement is not None
            row |= dict(zip(VOTES, (pair.agreement, 1 - pair.agreement) if known else (None, None)))
        yield row


def sample(keys: list[Key], number: int) -> list[Key]:
    """So many of the keys, the same ones each time, in their order."""
    return [keys[i] for i in sorted(np.random.default_rng(0).choice(len(keys), min(number, len(keys)), replace=False))]


def _decoded(pairs: Iterable[PreferencePair]) -> Iterator[tuple[Image, Image, str]]:
    for pair in pairs:
        yield decode_image(pair.winner, "chosen"), decode_image(pair.loser, "rejected"), pair.prompt


def _write(config: CheckConfig, report: dict, source: Source | None, good: list[Key]) -> None:
    config.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(config.output_dir / "report.json", json.dumps(report, indent=2) + "\n")
    keys = sample(good, config.num_sample_pairs) if source is not None and good else []
    pairs = zip(map(source.where, keys), source.pairs(keys)) if keys else ()
    write_text(config.output_dir / "index.html", check_page(report, list(pairs)))
