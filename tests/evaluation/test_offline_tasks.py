"""Questions of the offline tasks on constructed passages: where wrong choices come from."""

from collections import Counter
from pathlib import Path

from epochal.evaluation import offline_tasks
from epochal.evaluation.offline_tasks import CHOICES, Passage


def words_of(document: int, count: int) -> list[str]:
    """Words that no other document has, of letters alone: words with digits are not used."""
    return [f"{chr(97 + document)}ord{chr(97 + number // 26)}{chr(97 + number % 26)}" for number in range(count)]


def test_cloze_removes_the_last_word_and_offers_words_of_other_documents() -> None:
    passages = [
        Passage(f"and he saw the {word}{sign}", document, None)
        for document in range(4)
        for word, sign in zip(words_of(document, 20), ".,;:!?" * 4, strict=False)
    ]
    examples = list(offline_tasks._cloze(passages))
    assert len(examples) == len(passages)
    for question, passage in zip(examples, passages, strict=True):
        assert question["context"] == "and he saw the"
        true = question["choices"][question["answer"]]
        own = set(words_of(passage.document, 20))
        assert true in own and passage.text.strip(".,;:!?").endswith(f" {true}")
        false = set(question["choices"]) - {true}
        assert len(false) == CHOICES - 1 and all(word.isalpha() for word in false) and not false & own
    falses = {frozenset(question["choices"]) - own for question in examples[:20]}
    assert len(falses) > 15, "wrong choices differ between questions"


def test_wrong_words_are_drawn_by_frequency() -> None:
    """Half of all passages end in one word: it is a choice of most questions; uniform over words, of 3 in 41."""
    rare = [Passage(f"and he saw the {word}", 1, None) for word in words_of(1, 40)]
    common = [Passage("and he saw the king", 2, None)] * 40
    examples = list(
        offline_tasks._cloze([*(Passage(f"so be the {w}", 0, None) for w in words_of(0, 50)), *rare, *common])
    )
    counts = Counter(word for question in examples[:50] for word in question["choices"])
    assert counts["king"] > 35 > 12 > max(counts[word] for word in words_of(1, 40))


def test_wrong_passages_come_from_other_documents_and_have_similar_length() -> None:
    passages = []
    for document in range(3):
        lines = [f"{chr(97 + document)} line of words " + "x" * (length * 3 + document) for length in range(60)]
        passages += [Passage(one, document, next_) for one, next_ in zip(lines, [*lines[1:], None], strict=True)]
    passages.append(Passage("a line before a short one", 0, "And it was"))
    examples = list(offline_tasks._next_passage(passages))
    assert len(examples) == 3 * 59, "no question about the last passage of a document or one before a short passage"
    for question in examples:
        true = question["choices"][question["answer"]]
        assert true[0] == question["context"][0] and len(true) == len(question["context"]) + 3
        others = sorted(abs(len(p.text) - len(true)) for p in passages if p.text[0] != true[0])
        for text in question["choices"]:
            assert text == true or text[0] != true[0]
            assert text == true or abs(len(text) - len(true)) <= others[4 * CHOICES - 1]


def test_an_unchanged_file_is_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "cloze.jsonl"
    offline_tasks._write(path, "one")
    before = path.stat()
    offline_tasks._write(path, "one")
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    offline_tasks._write(path, "two")
    assert path.read_text() == "two"
