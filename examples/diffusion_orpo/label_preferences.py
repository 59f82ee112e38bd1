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
"""Label images in the browser, by keyboard: two of a prompt at a time, or several to rank. Out comes a preference dataset.

    python label_preferences.py --images_dir=my_images
    python label_preferences.py --images_dir=my_images --export=my_pairs

`my_images` is a folder with a metadata.jsonl, as make_preferences.py writes it without --scorers: a line for each image,
{"file_name": "0.png", "prompt": "a red fox"}. Images of the same prompt are compared with each other.

The page is served to this machine only. Every vote is on disk before the next question shows: stop at any moment, start again
later. On another machine, forward the port: ssh -L 8765:localhost:8765 that-machine.

Several people label a folder at once, each with a server and an --annotator name: they share the questions, and answer
--overlap of them all, which tells how far they agree.
"""

import unicodedata
from functools import partial
from pathlib import Path

from orpo.cli import read_flags, run
from orpo.config import LabellingConfig
from orpo.labelling.agreement import agreements
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import FOLDER, check_annotator, find_copies, read_votes
from orpo.pairs.image_folder import read_listing
from orpo.runtime.messages import printable
from orpo.runtime.start import begin


parse_args = partial(read_flags, LabellingConfig, __doc__)


def main(line: list[str] | None = None) -> None:
    config = parse_args(line)
    begin(__file__)
    if config.export is None:
        label(config)
    else:
        export_votes(config)


def label(config: LabellingConfig) -> None:
    """Serves the page until it is told to stop, then says how far annotators agree."""
    try:
        from orpo.labelling.server import new_token, open_socket, serve  # an export needs no server
    except ImportError as error:
        raise ValueError(f"the page needs {error.name}: pip install starlette uvicorn") from error

    annotator = unicodedata.normalize("NFC", config.annotator)
    check_annotator(annotator)
    folder = Path(config.images_dir)
    images = read_listing(folder)
    size = config.ranking or 2
    questions, left_over = make_questions(folder, images, size)
    if not questions:
        raise ValueError(f"{folder} has no prompt with {size} images: there is nothing to label.")
    listener, token = open_socket(config.port), new_token()
    session = Session(folder, annotator, questions, Settings(size, config.overlap, config.seed))
    if left_over:
        print(f"{left_over} images are in no question: too few others have their prompt.")
    report_copies(folder)
    progress = session.progress
    print(f"{progress['total']} questions for {annotator}, {progress['answered']} answered.")
    print(f"Open http://127.0.0.1:{listener.getsockname()[1]}/?token={token}\nCtrl-C ends it.", flush=True)
    serve(session, listener, token)
    progress = session.progress
    session.close()
    print(f"\n{progress['answered']} of {progress['total']} answered.")
    print(*agreements(read_votes(folder)), sep="\n")


def export_votes(config: LabellingConfig) -> None:
    """Writes the dataset, and says what is in it."""
    from orpo.labelling.export import export, labelled_pairs  # imports datasets, which the page does not need

    folder, output_dir = Path(config.images_dir), Path(config.export)
    votes = read_votes(folder)
    report_copies(folder)
    if not any(votes.values()):
        raise ValueError(f"{folder} has no votes to export yet. Label first: leave out --export.")
    pairs, skipped = labelled_pairs(folder, read_listing(folder), votes)
    lines = [f"Skipped: {count} {reason}." for reason, count in skipped.items()]
    if not pairs:
        raise ValueError(f"{folder}: no vote makes a pair. {' '.join(lines)}")
    decided = sum(pair.label != 0.5 for pair in pairs)
    number_of_votes = sum(map(len, votes.values()))
    lines.insert(
        0,
        f"{len(pairs)} pairs, {decided} with a preference, from {number_of_votes} votes of {', '.join(sorted(votes))}.",
    )
    lines += map(str, agreements(votes))
    export(folder, pairs, output_dir, "\n".join(lines) + "\n")
    print(
        *lines,
        f"Written to {output_dir}. Look at it: python check_preferences.py --dataset_name={output_dir}",
        sep="\n",
    )


def report_copies(folder: Path) -> None:
    copies = find_copies(folder)
    if copies:
        names = ", ".join(map(printable, copies))
        print(f"Skipped: {names} in {folder / FOLDER}, a copy of an annotator's votes, or renamed. Votes count once.")


if __name__ == "__main__":
    run(main)
