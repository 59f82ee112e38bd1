"""Which pairs scorers make of generated images, against a plain reading of the rules; and which images are of use."""

from itertools import combinations
from statistics import mean

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from orpo.generation.images import make_requests
from orpo.generation.ranking import choose, margins, usable
from PIL import Image


SCORES = st.integers(2, 4).flatmap(
    lambda n: arrays(float, (2, 3 * n), elements=st.integers(-50, 50).map(lambda x: x / 8))
)


def spread(row, groups) -> float:
    """Standard deviation within prompts, slowly."""
    squares, freedom = 0.0, 0
    for group in set(groups):
        values = [value for value, g in zip(row, groups) if g == group]
        squares += sum((value - mean(values)) ** 2 for value in values)
        freedom += len(values) - 1
    return (squares / freedom) ** 0.5


@given(SCORES, st.sampled_from([None, [1.0, 1.0], [3.0, 1.0]]), st.sampled_from([0.0, 0.5]), st.booleans())
def test_pairs_are_those_that_the_rules_name(scores, weights, min_margin, best_worst):
    groups = np.repeat(np.arange(3), scores.shape[1] // 3)
    expected = {}
    for i, j in combinations(range(len(groups)), 2):
        if groups[i] != groups[j]:
            continue
        differences = [(row[i] - row[j]) / (spread(row, groups) or 1) for row in scores]
        if weights is not None:
            margin = sum(w * d for w, d in zip(weights, differences)) / sum(weights)
        elif all(d > 0 for d in differences):
            margin = min(differences)
        elif all(d < 0 for d in differences):
            margin = max(differences)
        else:
            continue
        if margin and abs(margin) > min_margin + 1e-9:
            expected[i, j] = margin
    pairs = choose(margins(scores, groups, weights), groups, min_margin, best_worst)
    found = {(pair.first, pair.second): pair.margin for pair in pairs if abs(pair.margin) > min_margin + 1e-9}
    if not best_worst:
        assert found == pytest.approx(expected)
        return
    assert len({groups[i] for i, _ in found}) == len(found) == len({groups[i] for i, _ in expected})
    for (i, j), margin in found.items():
        assert margin == pytest.approx(expected[i, j])
        assert abs(margin) == pytest.approx(max(abs(m) for (k, _), m in expected.items() if groups[k] == groups[i]))


@given(arrays(float, (1, 12), elements=st.integers(-50, 50).map(float), unique=True))
def test_one_scorers_pair_is_its_best_against_its_worst(scores):
    groups = np.repeat([0, 1, 2], 4)
    for pair in choose(margins(scores, groups, None), groups, 0.0, best_worst=True):
        of_prompt = np.flatnonzero(groups == groups[pair.first])
        best, worst = of_prompt[scores[0, of_prompt].argmax()], of_prompt[scores[0, of_prompt].argmin()]
        assert (pair.first, pair.second) == ((best, worst) if pair.margin > 0 else (worst, best))


@given(SCORES, st.floats(0.1, 50), st.floats(-5, 5))
def test_a_scorers_scale_decides_nothing(scores, scale, shift):
    groups = np.repeat(np.arange(3), scores.shape[1] // 3)
    moved = scores.copy()
    moved[0] = scale * moved[0] + shift
    before, after = ([p.margin for p in margins(s, groups, [1.0, 2.0])] for s in (scores, moved))
    assert [m for m in after if abs(m) > 1e-9] == pytest.approx([m for m in before if abs(m) > 1e-9], abs=1e-8)


def test_black_flat_and_repeated_images_are_left_out(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    nearly_flat = np.full((16, 16, 3), 90, np.uint8) + (noise[0] % 2)
    almost_noise = noise[0].copy()
    almost_noise[3, 3] ^= 1
    images = [noise[0], np.zeros_like(noise[0]), noise[0], noise[1], nearly_flat, almost_noise, noise[0], noise[2]]
    requests = make_requests(["a", "b"], 4, seed=10)
    for request, pixels in zip(requests, images):
        Image.fromarray(pixels).save(tmp_path / request.name)
    kept, left_out = usable(tmp_path, requests)
    # The sixth differs by one pixel; the seventh repeats an image of another prompt, which is no pair with it.
    assert kept == [requests[i] for i in (0, 3, 5, 6, 7)]
    assert left_out == {"black": 1, "duplicate": 1, "flat": 1}
    (tmp_path / requests[0].name).write_bytes(b"half")
    with pytest.raises(ValueError, match="00000-0.png can't be read .* generated again"):
        usable(tmp_path, requests)


def test_every_image_has_a_seed_of_its_own():
    requests = make_requests(["a", "b", "a"], 4, seed=10)
    assert [request.seed for request in requests] == list(range(10, 22))
    assert len({request.name for request in requests}) == 12


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), st.integers(1, 4)), min_size=2, max_size=5
    )
)
def test_more_prompts_or_images_keep_those_that_are_there(runs):
    """Whatever was asked for before: an image keeps its name and seed, and no two share either."""
    known = {}
    for prompts, per_prompt in runs:
        requests = make_requests(prompts, per_prompt, 7, list(known.values()))
        assert [request.prompt for request in requests] == [prompt for prompt in prompts for _ in range(per_prompt)]
        assert len({request.name for request in requests}) == len(requests)
        again = make_requests(prompts, per_prompt, 7, list(known.values()))
        assert again == requests
        for request in requests:
            assert known.setdefault(request.name, request) == request
        assert len({request.seed for request in known.values()}) == len(known)
        for request in make_requests(prompts, per_prompt, 7, list(known.values())):
            assert known[request.name] == request  # nothing is generated twice
    first, per_prompt = runs[0]
    assert make_requests(first, per_prompt, 7, list(known.values())) == make_requests(first, per_prompt, 7)
