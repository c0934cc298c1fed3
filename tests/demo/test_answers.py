import pytest

from dsft.demo.answers import Answered, score


def answered(kind: str, answer: str, reference: str) -> Answered:
    return Answered(kind, "?", answer, reference)


def test_right_answers_score_one_and_shuffled_ones_do_not() -> None:
    items = [answered("lookup", f"`m.f{i}`", f"`m.f{i}`") for i in range(10)]
    scores = score(items)
    assert scores.f1 == scores.exact_match == 1.0
    assert scores.shuffled_f1_mean == scores.shuffled_f1_max == pytest.approx(0.5)  # "m" is common to all


def test_the_same_answer_to_everything_scores_no_better_than_shuffled() -> None:
    items = [answered("purpose", "Return the value.", f"Return the value number {i}.") for i in range(10)]
    scores = score(items)
    assert scores.f1 == pytest.approx(scores.shuffled_f1_mean)


def test_the_right_form_for_the_kind_beats_the_first_control_but_not_the_second() -> None:
    items = [answered("signature", "f(self)", f"g{i}(self)") for i in range(10)]
    items += [answered("purpose", "Return the list", f"Return the list {i}") for i in range(10)]
    scores = score(items)
    assert scores.f1 > scores.shuffled_f1_max
    assert scores.f1 == pytest.approx(scores.same_kind_f1_mean)
    assert set(scores.f1_by_kind) == {"signature", "purpose"}
