"""Writes what is generated from the code, and from measurements, into README.md, jaxmoe/README.md
and jaxmoe/serving/FIELDS.md.

.venv/bin/python tools/update_docs.py            rewrites them
.venv/bin/python tools/update_docs.py --check    exit code 1 where they are out of date

The README's tables of what runs come from the registry of architectures and what the parity tests
wrote down (tests/support/parity_tables.py).

The README's performance tables come from tools/measured/*.json, one file a run of jaxmoe_bench
(kernel, layer, decode or prefill) with --json; the command that made it stands above each table.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmoe.cli import flags
from jaxmoe.config.families import PARSERS
from jaxmoe.models.registry import SUPPORTED
from jaxmoe.serving.fields import docs_table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reliability.figures import markdown  # noqa: E402
from support import parity_tables  # noqa: E402

ROOT = Path(__file__).parents[1]
MEASURED = ROOT / "tools" / "measured"
BEGIN, END = "<!-- {} made by tools/update_docs.py -->\n", "<!-- end -->\n"
FIELDS_HEAD = """# Request fields

Made from `fields.py` by `tools/update_docs.py`.

Unknown fields are accepted and logged once; null means not given; a wrong type or range is a 400
that names the field. `chat` is /v1/chat/completions, `count_tokens` /v1/messages/count_tokens; the
others are called as they are here. What is "refused" may have the value that asks for nothing.

"""


# What tools/reliability --json wrote last.
FIGURES = ROOT / "tests/reliability/figures.json"


def between(text: str, name: str, content: str) -> str:
    """The text with `content` between the marks of `name`."""
    begin = BEGIN.format(name)
    before, found_begin, rest = text.partition(begin)
    _, found, after = rest.partition(END)
    assert found_begin and found, f"no place between {begin!r} and {END!r}"
    return before + begin + content + END + after


def measured_tables(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """A table a run, by the names of their files."""
    return "".join(_table(runs[name]) + "\n" for name in sorted(runs))


def _table(run: Mapping[str, Any]) -> str:
    machines = run["machines"]
    about = dict.fromkeys(
        f"{m['cpu']} ({m['cpu_id']}), {m['isa']}, {m['logical_cpus']} CPUs" for m in machines
    )
    loads = [m["load_average"] for m in machines]
    lines = [
        f"`{run['command']}` on {'; '.join(about)}, load {min(loads):.1f} to {max(loads):.1f}:",
        "",
        "| figure | threads | time | tok/s | read ceiling | of it | peak | of it | of the roof |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in run["figures"]:
        rate = "" if f["tokens_per_s"] is None else f"{f['tokens_per_s']:.1f}"
        lines.append(
            f"| {f['name']} | {f['threads']} | {f['median_seconds'] * 1e3:.3g} ms | {rate} | "
            f"{f['read_ceiling_bytes_per_s'] / 1e9:.1f} GB/s | {f['fraction_of_read_ceiling']:.2f} "
            f"| {f['peak_flops_per_s'] / 1e9:.0f} GFLOP/s | {f['fraction_of_peak']:.2f} | "
            f"{f['fraction_of_roofline']:.2f} |"
        )
    for o in run["overheads"]:
        lines += [
            "",
            f"{o['threads']} threads: an experts call without work takes "
            f"{o['empty_experts_call_ffi_us']:.2f} us through FFI and "
            f"{o['empty_experts_call_us']:.2f} us in C++, "
            f"a job that does nothing {o['empty_pool_job_us']:.2f} us.",
        ]
    if run["comparisons"]:
        lines += ["", "| in alternating rounds | threads | jaxmoe | rival | | times |"]
        lines += ["|---|---|---|---|---|---|"]
    for c in run["comparisons"]:
        ours, theirs = (
            sorted(c[name])[len(c[name]) // 2] for name in ("tokens_per_s", "rival_tokens_per_s")
        )
        lines.append(
            f"| {c['name']} | {c['threads']} | {ours:.1f} tok/s | {theirs:.1f} tok/s | "
            f"{c['rival']}: `{Path(c['command'].split()[0]).name} "
            f"{' '.join(c['command'].split()[3:])}` | {c['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def readme() -> str:
    text = (ROOT / "README.md").read_text()
    text = between(text, "flags", flags.docs_table((flags.SERVER,)) + "\n")
    text = between(text, "reliability", markdown(json.loads(FIGURES.read_text())) + "\n")
    results = parity_tables.load_results()
    text = between(text, "what runs", parity_tables.supported(results))
    text = between(text, "parity", parity_tables.held(results))
    runs = {file.stem: json.loads(file.read_text()) for file in MEASURED.glob("*.json")}
    return between(text, "measured", measured_tables(runs))


def smallest_family() -> str:
    """Of the families with both files of their own: its lines, and what it says of itself."""
    modules = {a: (PARSERS[a].__module__, SUPPORTED[a].names.__module__) for a in SUPPORTED}
    users = collections.Counter(module for both in modules.values() for module in both)
    files = {
        architecture: [ROOT / (module.replace(".", "/") + ".py") for module in both]
        for architecture, both in modules.items()
        if all(users[module] == 1 for module in both)
    }
    lines = {a: [len(file.read_text().splitlines()) for file in files[a]] for a in files}
    smallest = min(lines, key=lambda a: sum(lines[a]))
    rows = [f"`{smallest}`, the smallest, is {sum(lines[smallest])} lines and an entry in each of"]
    rows += ["two registries:", "", "| file | lines | its first words |", "|---|---|---|"]
    for file, count in zip(files[smallest], lines[smallest], strict=True):
        words = file.read_text().split('"""')[1].split("\n\n")[0].strip().replace("\n", " ")
        rows.append(f"| `{file.relative_to(ROOT / 'jaxmoe')}` | {count} | {words} |")
    for name in ("config/families.py", "models/registry.py"):
        text = (ROOT / "jaxmoe" / name).read_text()
        count = text.count(f'"{smallest}"')
        rows.append(f"| `{name}` | {count}, and an import | |")
    return "\n".join(rows) + "\n"


def insides() -> str:
    return between((ROOT / "jaxmoe/README.md").read_text(), "smallest family", smallest_family())


def main() -> int:
    files = {
        ROOT / "README.md": readme(),
        ROOT / "jaxmoe/README.md": insides(),
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
