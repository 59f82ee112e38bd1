"""The one form of what is wrong with a pair: its message, and its way through processes."""

import pickle

from orpo.pairs.bad_pair import ADVICE, BadPair


def test_the_message_says_where_what_and_what_to_do():
    bad = BadPair("bad label", "label_0 is 0.7", "row 3")
    assert str(bad.within("pairs (train)")) == f"pairs (train), row 3: label_0 is 0.7. {ADVICE['bad label']}"
    assert bad.within("pairs").summary == "pairs, row 3: label_0 is 0.7"
    assert str(BadPair("bad label", "it is missing", advice="Add it.")) == "it is missing. Add it."
    assert str(BadPair("a new kind", "it is odd")) == "it is odd."


def test_it_comes_back_whole_from_another_process():
    for bad in (BadPair("bad label", "label_0 is 0.7", "row 3"), BadPair("x", "y", advice="z").within("here")):
        back = pickle.loads(pickle.dumps(bad))
        assert (back.kind, back.problem, back.where, back.advice) == (bad.kind, bad.problem, bad.where, bad.advice)
        assert str(back) == str(bad)
