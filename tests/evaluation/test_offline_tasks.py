"""What is asked, of passages written out here: which choices are false, and how they were come by."""

from collections import Counter
from pathlib import Path

from epochal.evaluation import offline_tasks
from epochal.evaluation.offline_tasks import CHOICES, Passage


def words_of(document: int, kinds: int) -> list[str]:
    """Words that no other document has: made of letters, since a word with a digit is not asked for."""
    return [f"{chr(97 + document)}ord{chr(97 + kind // 26)}{chr(97 + kind % 26)}" for kind in range(kinds)]


def test_a_cloze_leaves_out_a_bare_word_and_offers_those_of_other_documents() -> None:
    passages = [
        Passage(f"and he saw the {word}{sign}", document, None)
        for document in range(4)
        for word, sign in zip(words_of(document, 20), ".,;:!?" * 4, strict=False)
    ]
    asked = list(offline_tasks._cloze(passages))
    assert len(asked) == len(passages)
    for question, passage in zip(asked, passages, strict=True):
        assert question["context"] == "and he saw the"
        true = question["choices"][question["answer"]]
        own = set(words_of(passage.document, 20))
        assert true in own and passage.text.strip(".,;:!?").endswith(f" {true}")
        false = set(question["choices"]) - {true}
        assert len(false) == CHOICES - 1 and all(word.isalpha() for word in false) and not false & own
    falses = {frozenset(question["choices"]) - own for question in asked[:20]}
    assert len(falses) > 15, "each question has its own draw"


def test_a_false_word_is_drawn_as_often_as_it_ends_a_passage() -> None:
    """Half of all passages end in one word: it is among the three of most questions, where 3 of 41 would be by chance."""
    rare = [Passage(f"and he saw the {word}", 1, None) for word in words_of(1, 40)]
    common = [Passage("and he saw the king", 2, None)] * 40
    asked = list(offline_tasks._cloze([*(Passage(f"so be the {w}", 0, None) for w in words_of(0, 50)), *rare, *common]))
    counts = Counter(word for question in asked[:50] for word in question["choices"])
    assert counts["king"] > 35 > 12 > max(counts[word] for word in words_of(1, 40))


def test_the_passages_that_do_not_follow_are_as_long_as_the_one_that_does_and_from_elsewhere() -> None:
    passages = []
    for document in range(3):
        lines = [f"{chr(97 + document)} line of words " + "x" * (length * 3 + document) for length in range(60)]
        passages += [Passage(one, document, next_) for one, next_ in zip(lines, [*lines[1:], None], strict=True)]
    passages.append(Passage("a line before a short one", 0, "And it was"))
    asked = list(offline_tasks._next_passage(passages))
    assert len(asked) == 3 * 59, "neither the last of a document nor one before a short one is asked about"
    for question in asked:
        true = question["choices"][question["answer"]]
        assert true[0] == question["context"][0] and len(true) == len(question["context"]) + 3
        others = sorted(abs(len(p.text) - len(true)) for p in passages if p.text[0] != true[0])
        for text in question["choices"]:
            assert text == true or text[0] != true[0]
            assert text == true or abs(len(text) - len(true)) <= others[4 * CHOICES - 1]


def test_a_file_that_holds_the_text_already_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "cloze.jsonl"
    offline_tasks._write(path, "one")
    before = path.stat()
    offline_tasks._write(path, "one")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    offline_tasks._write(path, "two")
    assert path.read_text() == "two"
