#!/usr/bin/env python
"""Is a preference data set fit to train on? Looks at every row, says what is wrong and what is odd, and shows some pairs.

    python check_preferences.py --dataset_name=my_pairs
    python check_preferences.py --dataset_path=shards

Writes `report.json` and `contact_sheet.png`. Ends with status 0 where training would accept the data, with 1
where not, and with 2 where there is nothing to look at: shards that are encoded hold no images.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import numpy as np
from orpo.checking.contact_sheet import contact_sheet
from orpo.checking.inspection import PairSource, inspect_all
from orpo.checking.prompt_lengths import load_tokenizers
from orpo.checking.report import PreferenceReport
from orpo.checking.sources import STOPS, RowSource, ShardSource
from orpo.checking.text import render
from orpo.data.dataset import DataOptions, load_pairs
from orpo.data.files import as_given
from orpo.data.flags import DATA_SET, IMAGES
from orpo.data.folders import is_pair_folders, read_pair_folders
from orpo.data.table import Table
from orpo.shards.flags import SHARDS
from orpo.shards.listing import find_shards
from orpo.system.flags import all_flags
from orpo.system.redaction import without_secrets
from orpo.system.start import begin
from orpo.training.flags import VALIDATION
from tqdm.auto import tqdm


SHARD_MEMBERS = ["original_prompt.txt", "jpg_0.*", "jpg_1.*", "label_0.txt"]


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    _add_data_arguments(parser.add_argument_group("data, as the training scripts take it"))
    _add_prompt_arguments(parser.add_argument_group("prompts"))
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output_dir",
        type=Path,
        default=Path("preference_check"),
        help="Folder for report.json and contact_sheet.png.",
    )
    group.add_argument("--num_sample_pairs", type=int, default=12, help="Pairs to show, chosen at random; 0: none.")
    group.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="Processes that decode. Default: one a core."
    )
    parser.set_defaults(random_crop=False, random_flip=False, proportion_empty_prompts=0.0, dataloader_num_workers=0)
    args = parser.parse_args(input_args)
    for flag in all_flags([DATA_SET, SHARDS, IMAGES, VALIDATION]):
        problem = flag.problem(getattr(args, flag.name, None))
        if problem:
            parser.error(problem)
    for name in ("num_sample_pairs", "num_workers"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be at least 0; got {getattr(args, name)}.")
    return args


def _add_data_arguments(group) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dataset_name",
        help="Identifier of a data set on the Hub, a local folder of parquet files, an imagefolder with metadata, or a "
        "folder with chosen/ and rejected/.",
    )
    source.add_argument("--dataset_path", nargs="+", help="Shards: folders, paths, URLs, or `pipe:` commands.")
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", help="Split to check. Default: the only one, else train.")
    group.add_argument("--max_train_samples", type=int, help="Check the first so many pairs of a data set only.")
    group.add_argument("--run_validation", action="store_true", help="Training will hold pairs out.")
    group.add_argument("--num_validation_pairs", type=int, default=64, help="Pairs that training will hold out.")
    group.add_argument("--num_train_examples", type=int, help="Samples in all shards, as training will be told.")
    group.add_argument(
        "--max_bad_samples", type=float, default=0.01, help="Share of the samples of shards that may be bad, 0 to 1."
    )
    group.add_argument("--resolution", type=int, default=1024, help="That training will resize to.")
    group.add_argument("--cache_dir", help="Folder for downloaded models and data sets.")


def _add_prompt_arguments(group) -> None:
    group.add_argument(
        "--pretrained_model_name_or_path",
        help="Pipeline whose tokenizers measure the prompts: a path, or a model identifier from huggingface.co/models.",
    )
    group.add_argument("--revision", help="Revision of the pretrained model.")
    group.add_argument(
        "--max_sequence_length",
        type=int,
        help="Tokens that training will take of a prompt, for tokenizers other than CLIP's. Default: what the tokenizer says.",
    )


def main(input_args: list[str] | None = None) -> int:
    args = parse_args(input_args)
    begin(Path(__file__).name)
    try:
        tokenizers = load_tokenizers(args) if args.pretrained_model_name_or_path else {}
    except ValueError as error:
        sys.exit(f"check_preferences.py: {error}")
    counts = PreferenceReport(args.resolution, tokenizers)
    report, source = check_rows(args, counts) if args.dataset_name else check_shards(args, counts)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(render(report))
    if source is not None and args.num_sample_pairs and counts.good_keys:
        write_contact_sheet(args, source, counts.good_keys, report["data"])
    return 0 if report["accepted"] else 1


def check_rows(args: argparse.Namespace, counts: PreferenceReport) -> tuple[dict, RowSource | None]:
    """Lets training's own loading judge a data set, then looks at its rows.

    Images that training's loading has decoded are not decoded again; datasets' cache remembers them for training itself.

    Returns:
        The report, and the rows, or None where there are none that can be looked at.
    """
    options = DataOptions.from_flags(args)
    try:
        load_pairs(options)
        reason = None
    except (ValueError, OSError) as error:
        reason = str(error)
    report = {"data": args.dataset_name, "accepted": reason is None, "reason": reason}
    max_pairs = None if args.max_train_samples is None else args.max_train_samples + options.num_held_out
    try:
        source = RowSource(_open_table(options, counts), max_pairs, decode=reason is not None)
    except (ValueError, OSError):
        return report, None  # told as the reason
    _count(source, counts, args.num_workers)
    names, used = source.table.dataset.column_names, source.table.columns.used
    columns = {
        "used": [column for column in names if column in used],
        "unused": [column for column in names if column not in used],
        "types": {column: str(feature) for column, feature in source.table.dataset.features.items()},
    }
    return report | {"columns": columns} | counts.summary(source.where), source


def _open_table(options: DataOptions, counts: PreferenceReport) -> Table:
    """All rows; of folders also those that stand beside others which training refuses."""
    folder = as_given(options.name)
    if not is_pair_folders(folder):
        return options.open_table()
    found = read_pair_folders(Path(folder))
    counts.passed_over = found.passed_over
    for problem in found.problems:
        counts.add_problem(problem)
    return Table.of(found.dataset(options.cache_dir), options.name, follows_paths=True)


def check_shards(args: argparse.Namespace, counts: PreferenceReport) -> tuple[dict, ShardSource | None]:
    """Looks at all samples of shards, and judges them as a training process without workers does.

    Returns:
        The report, and the samples, or None where no shards are found.
    """
    report = {"data": " ".join(map(without_secrets, args.dataset_path))}
    try:
        source = ShardSource(find_shards(args.dataset_path, args.num_train_examples))
    except (ValueError, OSError) as error:
        return report | {"accepted": False, "reason": str(error)}, None
    if source.shards.encoding is not None:
        print(f"{report['data']} holds latents, not images: check what it was made of instead.", file=sys.stderr)
        sys.exit(2)
    _count(source, counts, args.num_workers)
    reason = _why_shards_are_refused(args, source, counts)
    report |= {"accepted": reason is None, "reason": reason, "columns": {"used": SHARD_MEMBERS, "unused": []}}
    report |= counts.summary(source.where)
    worst, share = source.worst_shard(counts.bad_keys)
    if share > args.max_bad_samples:
        report["notes"].append(
            f"{share:.1%} of the samples of {worst} are bad. Each worker judges its own part: one that reads mostly this"
            " shard stops the run. Replace it, or raise --max_bad_samples."
        )
    return report, source


def _why_shards_are_refused(args: argparse.Namespace, source: ShardSource, counts: PreferenceReport) -> str | None:
    held_out = args.num_validation_pairs if args.run_validation else 0
    total = len(source) - held_out
    if total <= 0:
        return f"--num_validation_pairs={held_out} leaves none of the {len(source)} samples to train on."
    if counts.problems[STOPS]:
        return str(counts.first_problems[STOPS][0])
    bad, good = (sum(source.index(key) >= held_out for key in keys) for keys in (counts.bad_keys, counts.good_keys))
    if bad > args.max_bad_samples * total:
        return (
            f"{bad} of {total} samples are bad, more than --max_bad_samples={args.max_bad_samples}: replace them, or"
            " allow more."
        )
    return None if good else "There are only ties or bad samples. Check what made the shards."


def _count(source: PairSource, counts: PreferenceReport, num_workers: int) -> None:
    for pair in tqdm(inspect_all(source, num_workers), total=len(source), desc="Looking at pairs", unit="pair"):
        counts.add(pair)


def write_contact_sheet(args: argparse.Namespace, source: PairSource, keys: list, title: str) -> None:
    """Draws some of the pairs with these keys, the same ones each time."""
    number = min(args.num_sample_pairs, len(keys))
    chosen = [keys[i] for i in sorted(np.random.default_rng(0).choice(len(keys), number, replace=False))]
    sheet = contact_sheet([(source.where(key), source.pair(key)) for key in chosen], title)
    sheet.save(args.output_dir / "contact_sheet.png")
    print(f"\nLook at {number} of the pairs: {args.output_dir / 'contact_sheet.png'}")


if __name__ == "__main__":
    sys.exit(main())
