"""Writes what is generated from the code into README.md and jaxmoe/serving/FIELDS.md.

.venv/bin/python tools/update_docs.py            rewrites them
.venv/bin/python tools/update_docs.py --check    exit code 1 where they are out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

from jaxmoe.cli import flags
from jaxmoe.serving.fields import docs_table

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- made by tools/update_docs.py -->\n", "<!-- end -->\n"
FIELDS_HEAD = """# Request fields

Made from `fields.py` by `tools/update_docs.py`.

Unknown fields are accepted and logged once; null means not given; a wrong type or range is a 400
that names the field. `chat` is /v1/chat/completions, `count_tokens` /v1/messages/count_tokens; the
others are called as they are here. What is "refused" may have the value that asks for nothing.

"""


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"README.md has no place between {BEGIN!r} and {END!r}"
    return before + BEGIN + flags.docs_table((flags.SERVER,)) + "\n" + END + after


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
