import pytest

from dsft.demo.near_copies import NearCopies

TEXT = "the quick brown fox jumps over the lazy dog while the cat looks on from a warm stone wall"
OTHER = "seven ships came into the harbour at dawn and none of them carried a flag or a light"


def naive_containment(text: str, collection: list[str]) -> float:
    def shingles(value: str) -> set[tuple[str, ...]]:
        words = value.split()
        return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}

    known = set().union(*(shingles(value) for value in collection))
    own = shingles(text)
    return len(own & known) / len(own)


@pytest.mark.parametrize("num_changed", [0, 1, 3, 8])
def test_containment_is_that_of_sets_of_five_words(num_changed: int) -> None:
    words = TEXT.split()
    for position in range(num_changed):
        words[2 * position + 1] = f"new{position}"
    text = " ".join(words)
    assert NearCopies([TEXT, OTHER]).containment(text) == pytest.approx(naive_containment(text, [TEXT, OTHER]))


def test_case_and_punctuation_do_not_hide_a_copy() -> None:
    assert NearCopies([OTHER, TEXT]).containment(TEXT.upper().replace(" ", ",\n")) == 1.0


def test_a_text_patched_together_from_two_documents_is_found() -> None:
    patched = TEXT[: len(TEXT) // 2] + " " + OTHER[len(OTHER) // 2 :]
    assert NearCopies([TEXT, OTHER]).contains(patched)


def test_an_unrelated_text_and_a_short_one_are_not() -> None:
    near = NearCopies([TEXT])
    assert not near.contains(OTHER)
    assert not near.contains("the quick brown fox")
