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
"""Judge images in the browser, by keyboard: two of a prompt at a time, or several to rank. Out comes a preference data set.

    python label_preferences.py --images_dir=my_images
    python label_preferences.py --images_dir=my_images --export=my_pairs

`my_images` is a folder with a metadata.jsonl, as make_preferences.py writes it without --scorers: a line for each image,
{"file_name": "0.png", "prompt": "a red fox"}. Images of the same prompt are judged against each other.

The page is served to this machine only. Every vote is on disk before the next question shows: stop at any moment, start again
later. On another machine, forward the port: ssh -L 8765:localhost:8765 that-machine.

Several people judge a folder at once, each with a server and a --judge of their own: they share the questions, and answer
--overlap of them all, which tells how far they agree.
"""

import argparse
import json
import sys
from pathlib import Path

from orpo.data.listing import read_listing
from orpo.labelling.agreement import agreements, as_json
from orpo.labelling.export import export, judged_pairs
from orpo.labelling.flags import FLAGS
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import FOLDER, check_judge, read_votes
from orpo.runtime.durable import write_text
from orpo.runtime.flags import make_parser, parse
from orpo.runtime.start import begin


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    return parse(make_parser(__doc__, FLAGS), FLAGS, input_args)


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
    begin(Path(__file__).name)
    try:
        if args.export is None:
            judge(args)
        else:
            export_votes(args)
    except ValueError as error:
        sys.exit(f"label_preferences.py: {error}")


def judge(args: argparse.Namespace) -> None:
    """Serves the page until it is told to stop, then says how far judges agree."""
    try:
        from orpo.labelling.server import new_token, open_socket, serve  # an export needs no server
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install starlette uvicorn") from error

    check_judge(args.judge)
    folder = Path(args.images_dir)
    images = read_listing(folder)
    size = args.ranking or 2
    questions, left_over = make_questions(images, size)
    if not questions:
        raise ValueError(f"{folder} has no prompt with {size} images: there is nothing to judge.")
    session = Session(folder, args.judge, questions, Settings(size, args.overlap, args.seed))
    listener, token = open_socket(args.port), new_token()
    if left_over:
        print(f"{left_over} images are in no question: too few others have their prompt.")
    progress = session.progress
    print(f"{progress['total']} questions for {args.judge}, {progress['answered']} answered.")
    print(f"Open http://127.0.0.1:{listener.getsockname()[1]}/?token={token}\nCtrl-C ends it.", flush=True)
    serve(session, folder, listener, token)
    progress = session.progress
    session.close()
    print(f"\n{progress['answered']} of {progress['total']} answered.")
    report_agreement(folder)


def export_votes(args: argparse.Namespace) -> None:
    """Writes the data set, and says what is in it."""
    folder, output_dir = Path(args.images_dir), Path(args.export)
    votes = read_votes(folder)
    pairs, without_pair, outdated = judged_pairs(read_listing(folder), votes)
    if not pairs:
        raise ValueError(f"{folder} has no votes to export yet. Judge first: leave out --export.")
    number_of_votes = sum(map(len, votes.values()))
    decided = sum(pair.label != 0.5 for pair in pairs)
    lines = [
        f"{len(pairs)} pairs, {decided} with a preference, from {number_of_votes} votes of {', '.join(sorted(votes))}."
    ]
    if without_pair:
        lines.append(f"{without_pair} rankings without a best image make no pair.")
    if outdated:
        lines.append(f"{outdated} votes on images that are not in the folder any more are left out.")
    agreed = report_agreement(folder)
    export(folder, pairs, output_dir, "\n".join([*lines, *map(str, agreed)]) + "\n")
    print(
        *lines,
        f"Written to {output_dir}. Look at it: python check_preferences.py --dataset_name={output_dir}",
        sep="\n",
    )


def report_agreement(images_dir: Path) -> list:
    """Prints how far judges agree, and stores it with the votes."""
    votes = read_votes(images_dir)
    found = agreements(votes)
    if found:
        write_text(images_dir / FOLDER / "agreement.json", json.dumps(as_json(found), indent=2) + "\n")
        print(*found, sep="\n")
    return found


if __name__ == "__main__":
    main()
