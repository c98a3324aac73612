"""From bytes to text: one decoder, one cleaning of documents, one normal form."""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

BYTE_ORDER_MARK = "\ufeff"
REPLACEMENT = "\ufffd"

# Code points without width that editors and web pages leave between letters.
_INVISIBLE = dict.fromkeys(map(ord, "\ufeff\u200b\u2060"))

# A text whose share of null characters is above this is UTF-16 or UTF-32 that happens to decode as UTF-8.
MAX_NULL_SHARE = 0.1


@dataclass
class Reading:
    """Counts of what reading changed or left out, and first places."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, where: str, count: int = 1) -> None:
        """Count a case of a kind."""
        self.counts[kind] += count
        self.first.setdefault(kind, where)


def sentences(counts: Mapping[str, int], first: Mapping[str, str]) -> list[str]:
    """Return one line for each kind of a `Reading`."""
    return [f"{kind}: {count:,} (the first in {first[kind]})" for kind, count in counts.items()]


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8; raises ValueError that starts with `where` and names line and byte for anything else."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{where} is UTF-16 or UTF-32 text, not UTF-8 text (byte 0); save it as UTF-8.")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        place = f"byte {error.start}" + f" in line {line}" * (line > 1)
        raise ValueError(
            f"{where} is not UTF-8 text ({place}: 0x{data[error.start]:02x}); convert it to UTF-8."
        ) from None
    if text.count("\0") > MAX_NULL_SHARE * len(text):
        raise ValueError(f"{where} is full of null characters, as UTF-16 text is; save it as UTF-8.")
    return text


def clean(text: str, reading: Reading, where: str) -> str:
    """Return a document as it is stored; changes are counted in `reading`.

    It has no byte order mark at its start, line feeds at its line ends, and lone surrogates and null characters are U+FFFD.
    """
    if text.startswith(BYTE_ORDER_MARK):  # also inside of a file: joined files have one at each start
        reading.note("documents without their byte order mark", where)
        text = text.lstrip(BYTE_ORDER_MARK)
    if "\r" in text:
        reading.note("documents with line ends of Windows or old Macs, now \\n", where)
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        reading.note("null characters replaced by U+FFFD", where, text.count("\0"))
        text = text.replace("\0", REPLACEMENT)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # UTF-16 joins the two halves of a character; a lone half is replaced.
        whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        reading.note("lone surrogates replaced by U+FFFD", where, whole.count(REPLACEMENT) - text.count(REPLACEMENT))
        text = whole
    return text


def normal_form(text: str) -> str:
    """Return what two copies of a document have in common: NFC, runs of white space as one blank, nothing invisible."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_INVISIBLE))
    return " ".join(text.split())


def content_hash(text: str) -> int:
    """Return 64 bits of the SHA-256 of a text."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")
