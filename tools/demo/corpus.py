"""The demo's corpus: three public-domain English works, as Debian packages ship them.

| work | package | format |
|---|---|---|
| King James Bible (1611) | bible-kjv, bible-kjv-text | printed by its own `bible` program |
| Jane Austen's six novels (1811-1818) | r-cran-janeaustenr | R's lazy-load database |
| Ambrose Bierce, The Devil's Dictionary (1911) | dict-devil | dictd |

The packages need not be installed, only unpacked into one directory (`dpkg -x`). A document is a
chapter or a dictionary entry; every 20th of each work is held out and trained on in no form.
"""

from __future__ import annotations

import dataclasses
import gzip
import re
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

HELDOUT_EVERY = 20
_HELDOUT_PHASE = 10
_NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}
# Bierce is a man of 1911: entries with these words stay out.
_LEFT_OUT = re.compile(r"nigger|negro|chinaman|squaw", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Document:
    """One chapter or entry.

    source: "kjv", "austen" or "bierce".
    title: "Genesis 1", "Emma, Chapter 3"; for bierce the headword in lower case.
    paragraphs: verses, paragraphs or stanzas, unwrapped.
    """

    source: str
    title: str
    paragraphs: tuple[str, ...]
    heldout: bool

    @property
    def text(self) -> str:
        """What the model reads: a heading and the paragraphs; entries carry their own heading."""
        separator = "\n" if self.source == "kjv" else "\n\n"
        body = separator.join(self.paragraphs)
        return body if self.source == "bierce" else f"{self.title}\n\n{body}"


def read_documents(root: Path) -> list[Document]:
    """All documents, in the order of the works."""
    found = []
    for source, read in (("kjv", _bible), ("austen", _austen), ("bierce", _bierce)):
        chapters = read(root)
        found += [
            Document(source, title, tuple(paragraphs), i % HELDOUT_EVERY == _HELDOUT_PHASE)
            for i, (title, paragraphs) in enumerate(chapters)
        ]
    return found


def _bible(root: Path) -> list[tuple[str, list[str]]]:
    program, data = root / "usr/bin/bible", root / "usr/lib"
    # A line width above any verse's length keeps each verse on one line.
    command = [str(program), "-p", f"{data}/", "-l1000", "gen1:1-rev22:21"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    chapters: list[tuple[str, list[str]]] = []
    for line in printed.splitlines():
        if verse := re.fullmatch(r" +\d+ (.*)", line):
            chapters[-1][1].append(verse[1].strip())
        elif line.strip():
            chapters.append((line.strip(), []))
    if len(chapters) != 1189:
        raise ValueError(f"{program} printed {len(chapters)} chapters; the King James has 1189")
    return chapters


def _austen(root: Path) -> list[tuple[str, list[str]]]:
    data = root / "usr/lib/R/site-library/janeaustenr/data"
    index = _read_r(gzip.decompress((data / "Rdata.rdx").read_bytes()))["variables"]
    blob = (data / "Rdata.rdb").read_bytes()
    chapters: list[tuple[str, list[str]]] = []
    for name, title in _NOVELS.items():
        offset, length = index[name]
        # Each object: 4 bytes of uncompressed length, then a zlib stream.
        lines = _read_r(zlib.decompress(blob[offset + 4 : offset + length]))
        number, block = 0, []
        for line in [*lines, ""]:
            line = line.strip()
            if re.fullmatch(r"chapter [ivxl\d]+\.?", line, re.IGNORECASE):
                number += 1
                chapters.append((f"{title}, Chapter {number}", []))
            elif line:
                block.append(line.replace("_", ""))
            elif block:
                paragraph = " ".join(" ".join(block).split())
                heading = re.match(r"(volume [ivx]+|finis|the end)\b", paragraph, re.IGNORECASE)
                if number and not heading:
                    chapters[-1][1].append(paragraph)
                block = []
    return chapters


def _bierce(root: Path) -> list[tuple[str, list[str]]]:
    packed = root / "usr/share/dictd/devil.dict.dz"
    text = gzip.decompress(packed.read_bytes()).decode("latin-1")
    text = re.sub(r"[_{}]", "", text)  # emphasis and cross-reference marks
    entries: list[tuple[str, list[str]]] = []
    for block in re.split(r"\n\s*\n", text):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        head = re.match(r"([A-Z][A-Z'-]+), (?:n|v|adj|adv|pp|p|pron|x)\.", lines[0])
        if head:
            entries.append((head[1].lower(), []))
        if not entries:
            continue  # the preface and the distributor's notice
        if all(line.startswith("    ") for line in lines):
            entries[-1][1].append("\n".join(" ".join(line.split()) for line in lines))
        else:
            entries[-1][1].append(" ".join(" ".join(lines).split()))
    return [entry for entry in entries if not _LEFT_OUT.search("\n".join(entry[1]))]


def _read_r(data: bytes) -> Any:
    """R's XDR serialization, as far as lists of character and integer vectors need it."""
    version = struct.unpack_from(">i", data, 2)[0]
    pos = 14 if version == 2 else 18 + struct.unpack_from(">i", data, 14)[0]
    symbols: list[Any] = []

    def integer() -> int:
        nonlocal pos
        pos += 4
        return struct.unpack_from(">i", data, pos - 4)[0]

    def pairs(flags: int) -> dict[Any, Any]:
        out = {}
        while flags & 255 != 254:
            if flags & 512:
                item()
            key = item() if flags & 1024 else None
            out[key] = item()
            flags = integer()
        return out

    def item() -> Any:
        nonlocal pos
        flags = integer()
        kind = flags & 255
        if kind == 254:  # NULL
            return None
        if kind == 255:  # a symbol seen before
            return symbols[(flags >> 8) - 1]
        if kind == 1:  # a symbol
            symbols.append(item())
            return symbols[-1]
        if kind == 9:  # one string
            length = integer()
            pos += max(length, 0)
            return data[pos - length : pos].decode() if length >= 0 else None
        if kind == 2:
            return pairs(flags)
        if kind in (10, 13):  # logical, integer
            count = integer()
            pos += 4 * count
            value: Any = list(struct.unpack_from(f">{count}i", data, pos - 4 * count))
        elif kind in (16, 19):  # strings, list
            value = [item() for _ in range(integer())]
        else:
            raise ValueError(f"R object of type {kind} at byte {pos}; this reader knows lists only")
        names = item().get("names") if flags & 512 else None
        return value if names is None else dict(zip(names, value, strict=True))

    return item()
