"""Votes on disk: a file of JSON lines for each annotator, to which lines are only ever added.

A vote is on disk (`fsync`) before the annotator sees the next question. A line that a killed process left half-written was
never confirmed: it is cut off when the file is opened again. An undone vote stays, followed by the line that undoes it.

A vote says what it is about, whatever becomes of the names of files: its annotator, the prompt, the content of its images.
"""

import errno
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ..runtime.durable import sync, sync_descriptor
from ..runtime.lock import take
from ..runtime.messages import printable


FOLDER = "votes"
CHOICES = ("best", "tie", "bad")


@dataclass(frozen=True)
class Vote:
    """An annotator's answer to a question.

    Attributes:
        annotator: who gave it.
        question: its id.
        prompt: of its images.
        choice: "best" where one is preferred, "tie" for no preference, "bad" where all images are.
        best: name of the preferred image; else None.
        worst: name of the worst one; in a pair, the other one.
        shown: names of the images from left to right.
        digests: of the content of these images.
        seconds: from showing the question to the vote, as the page measured it.
        time: of the vote, in ISO 8601.
    """

    annotator: str
    question: str
    prompt: str
    choice: str
    best: str | None
    worst: str | None
    shown: tuple[str, ...]
    digests: tuple[str, ...]
    seconds: float
    time: str


class VoteLog:
    """An annotator's file, which one process at a time may add to.

    Attributes:
        votes: those that count, by question, in the order in which they were given.
    """

    def __init__(self, folder: Path, annotator: str) -> None:
        """Opens the file, and cuts off a line that was not fully written.

        Raises:
            ValueError: the annotator's name can't be a file name, another process holds the file, or it is damaged.
            OSError: the folder can't be written to.
        """
        check_annotator(annotator)
        (folder / FOLDER).mkdir(exist_ok=True)
        self.path = folder / FOLDER / f"{annotator}.jsonl"
        self._owner = open(
            self.path.with_suffix(".lock"), "a+", encoding="utf-8"
        )  # every line of the file itself is a vote
        try:
            take(
                self._owner,
                f"{annotator} is already at work in this folder, in {{holder}}. Continue there, stop it, or name somebody"
                " else as --annotator: several annotators may work at once.",
            )
            self._file = open(self.path, "a+b", buffering=0)
        except BaseException:
            self._owner.close()
            raise
        try:
            self.votes = _parse(self.path, self._complete_part())
            self._check_owner(annotator)
        except BaseException:
            self.close()
            raise
        sync(folder / FOLDER)

    def _check_owner(self, annotator: str) -> None:
        others = {vote.annotator for vote in self.votes.values()} - {annotator}
        if others:
            raise ValueError(
                f"{self.path} holds votes of {printable(', '.join(sorted(others)))}: it is a copy, or a name that differs in"
                " capitals only. Name another --annotator, or move the file away."
            )

    def _complete_part(self) -> bytes:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            self._file.truncate(len(complete))
            sync_descriptor(self._file.fileno())
        return complete

    def add(self, vote: Vote) -> None:
        """Adds a vote, and returns when it is on disk."""
        self._write(asdict(vote))
        self.votes[vote.question] = vote

    def undo(self) -> Vote | None:
        """Takes back the last vote that counts, and returns it; None if there is none."""
        if not self.votes:
            return None
        question = next(reversed(self.votes))
        self._write({"undo": question})
        return self.votes.pop(question)

    def _write(self, entry: dict) -> None:
        """
        Raises:
            OSError: the disk is full or gone. The file is unchanged.
        """
        line = json.dumps(entry).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            sync_descriptor(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()
        self._owner.close()


def read_votes(folder: Path) -> dict[str, dict[str, Vote]]:
    """The votes of all annotators, as far as they are on disk: annotator to question to vote.

    Raises:
        ValueError: a file is damaged.
    """
    return {path.stem: votes for path, votes in _read_files(folder) if votes is not None}


def find_copies(folder: Path) -> list[str]:
    """The names of files that are no annotator's: copies, as programs make them of files that they could not reconcile."""
    return [path.name for path, votes in _read_files(folder) if votes is None]


def _read_files(folder: Path) -> Iterator[tuple[Path, dict[str, Vote] | None]]:
    """Each file with its votes, or None where it is a copy: "me (1)", "me - Copy", "me.bak", whatever its name.

    An annotator's own file has the annotator's name, and votes of nobody else.
    """
    for path in sorted((folder / FOLDER).glob("[!.]*.jsonl*")):
        content, annotator, votes = path.read_bytes(), unicodedata.normalize("NFC", path.stem), None
        if path.suffix == ".jsonl" and is_name(annotator):
            votes = _parse(path, content[: content.rfind(b"\n") + 1])
            if any(vote.annotator != annotator for vote in votes.values()):
                votes = None
        yield path.with_stem(annotator), votes


def is_name(name: str) -> bool:
    """Whether every file system accepts an annotator's name."""
    return re.fullmatch(r"[\w][\w.@+-]{0,63}", name) is not None


def check_annotator(name: str) -> None:
    """
    Raises:
        ValueError: an annotator's name is not one that every file system accepts.
    """
    if not is_name(name):
        raise ValueError(
            f"--annotator={printable(name)}: a name begins with a letter or digit, and has letters, digits and . _ @ + - only."
        )


def _parse(path: Path, content: bytes) -> dict[str, Vote]:
    votes: dict[str, Vote] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "undo" in entry:
                del votes[entry["undo"]]
                continue
            vote = Vote(**{**entry, "shown": tuple(entry["shown"]), "digests": tuple(entry["digests"])})
            if vote.choice not in CHOICES or (vote.choice == "best") != (vote.best in vote.shown):
                raise ValueError(f"choice {vote.choice!r} of {vote.best!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number} is damaged ({printable(repr(error))}). Fix it, or remove the line: its question is"
                " then asked again."
            ) from error
        votes.pop(vote.question, None)
        votes[vote.question] = vote
    return votes
