"""Writes what is generated from the code into README.md and jaxmoe/serving/FIELDS.md.

.venv/bin/python tools/update_docs.py            rewrites them
.venv/bin/python tools/update_docs.py --check    exit code 1 where they are out of date
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jaxmoe.cli import flags
from jaxmoe.serving.fields import docs_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reliability.figures import markdown  # noqa: E402

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by tools/update_docs.py -->\n", "<!-- end -->\n"
FIELDS_HEAD = """# Request fields

Made from `fields.py` by `tools/update_docs.py`.

Unknown fields are accepted and logged once; null means not given; a wrong type or range is a 400
that names the field. `chat` is /v1/chat/completions, `count_tokens` /v1/messages/count_tokens; the
others are called as they are here. What is "refused" may have the value that asks for nothing.

"""


# What tools/reliability --json wrote last.
FIGURES = ROOT / "tests/reliability/figures.json"


def readme() -> str:
    """README.md with its tables filled in, in their order: flags, reliability figures."""
    out = (ROOT / "README.md").read_text()
    tables = [flags.docs_table((flags.SERVER,)), markdown(json.loads(FIGURES.read_text()))]
    at = 0
    for table in tables:
        at = out.find(BEGIN, at) + len(BEGIN)
        end = out.find(END, at)
        assert at >= len(BEGIN) and end >= 0, f"README.md lacks a place of {BEGIN!r} and {END!r}"
        out = out[:at] + table + "\n" + out[end:]
        at += len(table)
    assert BEGIN not in out[at:], "README.md has a place that no table is for"
    return out


def main() -> int:
    files = {
        ROOT / "README.md": readme(),
        ROOT / "jaxmoe/serving/FIELDS.md": FIELDS_HEAD + docs_table() + "\n",
    }
    stale = [f for f, text in files.items() if not f.exists() or f.read_text() != text]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is out of date; run tools/update_docs.py")
        return bool(stale)
    for file in stale:
        file.write_text(files[file])
    return 0


if __name__ == "__main__":
    sys.exit(main())
