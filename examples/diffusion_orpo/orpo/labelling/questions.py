"""The questions: two images of a prompt, or k of them to rank, in an order that a seed decides."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from ..pairs.image_folder import ListedImage, image_path


@dataclass(frozen=True)
class Question:
    """Images of a prompt that are compared with each other.

    Attributes:
        id: follows from the prompt and the images' content. So images that are added or renamed change no question, and one
            that is exchanged makes another.
        prompt: of all of them.
        images: two, or those to rank.
        digests: of the images' content.
    """

    id: str
    prompt: str
    images: tuple[ListedImage, ...]
    digests: tuple[str, ...]

    @classmethod
    def of(cls, images: Iterable[ListedImage], digests: Iterable[str]) -> "Question":
        images, digests = tuple(images), tuple(digests)
        prompt = images[0].prompt
        return cls(digest("\0".join([prompt, *sorted(digests)]).encode()), prompt, images, digests)


def digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def digest_images(folder: Path, images: list[ListedImage]) -> dict[str, str]:
    """Digests of the content of image files, by name."""
    with ThreadPoolExecutor() as pool:
        return dict(pool.map(lambda i: (i.name, digest(image_path(folder, i.name).read_bytes())), images))


def make_questions(folder: Path, images: list[ListedImage], size: int) -> tuple[list[Question], int]:
    """Groups images by prompt, in their order, and cuts the groups.

    Args:
        folder: of the images.
        images: all of them.
        size: images in a question.

    Returns:
        The questions, and how many images are in none, since too few of their prompt are left.
    """
    digests = digest_images(folder, images)
    by_prompt: dict[str, list[ListedImage]] = {}
    for image in images:
        by_prompt.setdefault(image.prompt, []).append(image)
    groups = [group[i : i + size] for group in by_prompt.values() for i in range(0, len(group) - size + 1, size)]
    questions = [Question.of(group, (digests[image.name] for image in group)) for group in groups]
    return list({question.id: question for question in questions}.values()), len(images) - size * len(groups)


def fraction(*key: object) -> float:
    """A number in [0, 1) that follows from the key alone, and looks random."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def arranged(question: Question, seed: int, annotator: str) -> Question:
    """The question with its images from left to right: half of the annotators see the sides of a pair the other way round."""
    places = sorted(range(len(question.images)), key=lambda i: fraction("place", seed, annotator, question.id, i))
    images, digests = question.images, question.digests
    return replace(question, images=tuple(images[i] for i in places), digests=tuple(digests[i] for i in places))


def order(questions: list[Question], seed: int, annotator: str, overlap: float) -> list[Question]:
    """The questions in the order in which an annotator sees them.

    Those that everybody answers come in the same order for all, spread evenly over the others, so that annotators have answers
    to compare however far they get. The others come in an order of the annotator's own: two annotators who work at the same time
    rarely get the same one.

    Args:
        questions: all of them.
        seed: of the folder.
        annotator: who is asked.
        overlap: the share that everybody answers.
    """
    common = sorted(
        (q for q in questions if is_common(q, seed, overlap)), key=lambda q: fraction("common", seed, q.id)
    )
    own = sorted(
        (q for q in questions if not is_common(q, seed, overlap)), key=lambda q: fraction("own", seed, annotator, q.id)
    )
    rank = {q.id: (i + 0.5) / len(group) for group in (common, own) for i, q in enumerate(group)}
    return sorted(questions, key=lambda q: (rank[q.id], q.id))


def is_common(question: Question, seed: int, overlap: float) -> bool:
    """Whether everybody answers a question."""
    return fraction("overlap", seed, question.id) < overlap
