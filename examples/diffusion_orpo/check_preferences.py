#!/usr/bin/env python
# coding=utf-8
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Is a preference data set fit to train on? Looks at every row, says what is wrong and what is odd, and shows some pairs.

    python check_preferences.py --dataset_name=my_pairs
    python check_preferences.py --dataset_path=shards

Writes `report.json` and `contact_sheet.png`; with --filter also a copy without what is wrong; and with --scorers it says how
often each of these agrees with the labels. Ends with status 0 where training would accept the data, with 1
where not, and with 2 where there is nothing to look at: shards that are encoded hold no images.
"""

import argparse
import os
import sys
from pathlib import Path

from orpo.data.flags import DATA_SET, IMAGES, READING, check_reading
from orpo.scoring.names import BUILT_IN
from orpo.shards.flags import SHARDS
from orpo.system.flags import all_flags, pick
from orpo.system.start import begin
from orpo.training.flags import VALIDATION


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
        "--filter",
        type=Path,
        help="New folder for a copy, as parquet, without what is complained of: contradictions, duplicates, pairs of an image "
        "with itself, bad rows, low agreement; and without ties.",
    )
    group.add_argument(
        "--scorers",
        nargs="+",
        default=[],
        help=f"Scorers to compare with the labels. Built in: {', '.join(BUILT_IN)}. Your own: my_module:my_function or "
        "path/to/file.py:my_function, as evaluate_lora.py takes them.",
    )
    group.add_argument(
        "--num_scored_pairs", type=int, default=1000, help="Pairs that scorers judge, chosen at random; 0: all."
    )
    group.add_argument(
        "--num_workers", type=int, default=os.cpu_count(), help="Processes that decode. Default: one a core."
    )
    parser.set_defaults(random_crop=False, random_flip=False, proportion_empty_prompts=0.0, dataloader_num_workers=0)
    args = parser.parse_args(input_args)
    for flag in all_flags([DATA_SET, SHARDS, IMAGES, VALIDATION]):
        problem = flag.problem(getattr(args, flag.name, None))
        if problem:
            parser.error(problem)
    check_reading(parser, args)
    for name in READING if args.dataset_path else ():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} means nothing for shards.")
    for name in ("num_sample_pairs", "num_scored_pairs", "num_workers"):
        if getattr(args, name) < 0:
            parser.error(f"--{name} must be at least 0; got {getattr(args, name)}.")
    if args.filter is not None and args.filter.exists() and (args.filter.is_file() or any(args.filter.iterdir())):
        parser.error(f"--filter={args.filter} is there already: name a new folder.")
    return args


def _add_data_arguments(group) -> None:
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--dataset_name",
        help="Identifier of a data set on the Hub, a local folder or file of parquet, JSONL or CSV, an imagefolder with "
        "metadata, or a folder with chosen/ and rejected/.",
    )
    source.add_argument("--dataset_path", nargs="+", help="Shards: folders, paths, URLs, or `pipe:` commands.")
    group.add_argument("--dataset_config_name", help="Configuration of the data set, if it has several.")
    group.add_argument("--dataset_split_name", help="Split to check. Default: the only one, else train.")
    for flag in pick([DATA_SET], READING):
        flag.add_to(group)
    group.add_argument("--max_train_samples", type=int, help="Check the first so many pairs only, and those held out.")
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

    # Torch and the libraries on top of it take seconds to load: not before the flags are known to be good.
    from orpo.checking.check import check
    from orpo.scoring.label_agreement import LabelJudge

    try:
        return check(args, LabelJudge(args.scorers) if args.scorers else None)
    except ValueError as error:  # a scorer that fails
        sys.exit(f"check_preferences.py: {error}")


if __name__ == "__main__":
    sys.exit(main())
