"""Votes on disk: a file of JSON lines for each judge, to which lines are only ever added.

A vote is on disk (`fsync`) before the judge sees the next question. A line that a killed process left half-written was
never confirmed: it is cut off when the file is opened again. An undone vote stays, followed by the line that undoes it.
"""

import errno
import json
import os
import re
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from ..runtime.durable import sync
from ..runtime.messages import printable


FOLDER = "votes"
CHOICES = ("best", "tie", "bad")


@dataclass(frozen=True)
class Vote:
    """A judge's answer to a question.

    Attributes:
        question: its id.
        choice: "best" where one is preferred, "tie" for no preference, "bad" where all images are.
        best: name of the preferred image; else None.
        worst: name of the worst one; in a pair, the other one.
        shown: names of the images from left to right.
        seconds: from showing the question to the vote, as the page measured it.
        time: of the vote, in ISO 8601.
    """

    question: str
    choice: str
    best: str | None
    worst: str | None
    shown: tuple[str, ...]
    seconds: float
    time: str


class VoteLog:
    """A judge's file, which one process at a time may add to.

    Attributes:
        votes: those that count, by question, in the order in which they were given.
    """

    def __init__(self, folder: Path, judge: str) -> None:
        """Opens the file, and cuts off a line that was not fully written.

        Raises:
            ValueError: the judge's name can't be a file name, another process holds the file, or it is damaged.
        """
        check_judge(judge)
        (folder / FOLDER).mkdir(exist_ok=True)
        self.path = folder / FOLDER / f"{judge}.jsonl"
        self._file = open(self.path, "a+b", buffering=0)
        try:
            self._lock(judge)
            self.votes = _read(self.path, self._complete_part())
        except BaseException:
            self._file.close()
            raise
        sync(folder / FOLDER)

    def _lock(self, judge: str) -> None:
        import fcntl  # which Windows lacks: there `begin` says that it is not supported

        owner = self.path.with_suffix(".lock")  # beside it, as every line of the file itself is a vote
        self._owner = open(owner, "a+", encoding="utf-8")
        try:
            fcntl.lockf(self._owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            self._owner.seek(0)
            holder = printable(self._owner.read().strip())
            self._owner.close()
            raise ValueError(
                f"{judge} is already judging this folder, in {holder}. Continue there, stop it, or name somebody else as"
                " --judge: several judges may work at once."
            ) from error
        self._owner.truncate(0)
        self._owner.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._owner.flush()

    def _complete_part(self) -> bytes:
        self._file.seek(0)
        content = self._file.read()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            self._file.truncate(len(complete))
            os.fsync(self._file.fileno())
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
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(end)
            raise

    def close(self) -> None:
        self._file.close()
        self._owner.close()


def read_votes(folder: Path) -> dict[str, dict[str, Vote]]:
    """The votes of all judges, as far as they are on disk: judge to question to vote.

    Raises:
        ValueError: a file is damaged.
    """
    votes = {}
    for path in sorted((folder / FOLDER).glob("*.jsonl")):
        content = path.read_bytes()
        votes[path.stem] = _read(path, content[: content.rfind(b"\n") + 1])
    return votes


def check_judge(name: str) -> None:
    """
    Raises:
        ValueError: a judge's name is not one that every file system accepts.
    """
    if not re.fullmatch(r"[\w][\w.@+-]{0,63}", name):
        raise ValueError(
            f"--judge={printable(name)}: a name begins with a letter or digit, and has letters, digits and . _ @ + - only."
        )


def _read(path: Path, content: bytes) -> dict[str, Vote]:
    votes: dict[str, Vote] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "undo" in entry:
                del votes[entry["undo"]]
                continue
            vote = Vote(**{**entry, "shown": tuple(entry["shown"])})
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
