#!/usr/bin/env python
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
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import FOLDER, check_judge, read_votes
from orpo.system.durable import rename


def parse_args(input_args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--images_dir", type=Path, required=True, help="Folder of the images and their metadata.jsonl; votes go there."
    )
    parser.add_argument("--judge", default="me", help="Who judges.")
    parser.add_argument(
        "--ranking",
        type=int,
        metavar="K",
        help="Show K images of a prompt, 3 to 9, and take the best, then the worst. Default: show two.",
    )
    parser.add_argument(
        "--overlap",
        type=float,
        default=0.2,
        help="Share of the questions, from 0 to 1, that every judge answers; each of the others goes to one judge.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the sides on which images stand, and of the order.")
    parser.add_argument("--port", type=int, default=8765, help="Port of the page; 0 for any that is free.")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="DIR",
        help="Write the votes of all judges as a data set to this folder, and serve no page.",
    )
    args = parser.parse_args(input_args)
    if args.ranking is not None and not 3 <= args.ranking <= 9:
        parser.error(f"--ranking must be between 3 and 9; got {args.ranking}.")
    if not 0 <= args.overlap <= 1:
        parser.error(f"--overlap must be between 0 and 1; got {args.overlap}.")
    if not 0 <= args.port <= 65535:
        parser.error(f"--port must be between 0 and 65535; got {args.port}.")
    return args


def main(input_args: list[str] | None = None) -> None:
    args = parse_args(input_args)
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
    images = read_listing(args.images_dir)
    size = args.ranking or 2
    questions, left_over = make_questions(images, size)
    if not questions:
        raise ValueError(f"{args.images_dir} has no prompt with {size} images: there is nothing to judge.")
    session = Session(args.images_dir, args.judge, questions, Settings(size, args.overlap, args.seed))
    listener, token = open_socket(args.port), new_token()
    if left_over:
        print(f"{left_over} images are in no question: too few others have their prompt.")
    progress = session.progress
    print(f"{progress['total']} questions for {args.judge}, {progress['answered']} answered.")
    print(f"Open http://127.0.0.1:{listener.getsockname()[1]}/?token={token}\nCtrl-C ends it.", flush=True)
    serve(session, args.images_dir, listener, token)
    progress = session.progress
    session.close()
    print(f"\n{progress['answered']} of {progress['total']} answered.")
    report_agreement(args.images_dir)


def export_votes(args: argparse.Namespace) -> None:
    """Writes the data set, and says what is in it."""
    votes = read_votes(args.images_dir)
    pairs, without_pair, outdated = judged_pairs(read_listing(args.images_dir), votes)
    if not pairs:
        raise ValueError(f"{args.images_dir} has no votes to export yet. Judge first: leave out --export.")
    number_of_votes = sum(map(len, votes.values()))
    decided = sum(pair.label != 0.5 for pair in pairs)
    lines = [
        f"{len(pairs)} pairs, {decided} with a preference, from {number_of_votes} votes of {', '.join(sorted(votes))}."
    ]
    if without_pair:
        lines.append(f"{without_pair} rankings without a best image make no pair.")
    if outdated:
        lines.append(f"{outdated} votes on images that are not in the folder any more are left out.")
    agreed = report_agreement(args.images_dir)
    export(args.images_dir, pairs, args.export, "\n".join([*lines, *map(str, agreed)]) + "\n")
    print(
        *lines,
        f"Written to {args.export}. Look at it: python check_preferences.py --dataset_name={args.export}",
        sep="\n",
    )


def report_agreement(images_dir: Path) -> list:
    """Prints how far judges agree, and stores it with the votes."""
    votes = read_votes(images_dir)
    found = agreements(votes)
    if found:
        path = images_dir / FOLDER / "agreement.json"
        partial = path.with_name(".agreement.json.partial")
        partial.write_text(json.dumps(as_json(found), indent=2) + "\n", encoding="utf-8")
        rename(partial, path)
        print(*found, sep="\n")
    return found


if __name__ == "__main__":
    main()
