"""The chat page's markdown, as the nodes it makes in a real browser."""

from __future__ import annotations

from support.browser import needs_chromium

pytestmark = needs_chromium

OUT = 'target="_blank" rel="noopener noreferrer nofollow"'
CENTER, RIGHT = 'style="text-align: center;"', 'style="text-align: right;"'
# Source, and the HTML of its blocks with "|" between them.
CASES = [
    (
        "plain *em* **strong** ***both*** ~~del~~",
        "<p>plain <em>em</em> <strong>strong</strong> <strong><em>both</em></strong> "
        "<del>del</del></p>",
    ),
    ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    (
        "a `<code>` and ``b`c``",
        "<p>a <code>&lt;code&gt;</code> and <code>b`c</code></p>",
    ),
    ("## Head *x* ##\ntext", "<h2>Head <em>x</em></h2>|<p>text</p>"),
    ("one\ntwo\n\nthree", "<p>one<br>two</p>|<p>three</p>"),
    (
        "- a\n- b\n  - c\n\n1. x\n2. y",
        '<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul>|<ol start="1"><li>x</li><li>y</li></ol>',
    ),
    (
        "3) x\n\n   more\n4) y",
        '<ol start="3"><li><p>x</p><p>more</p></li><li>y</li></ol>',
    ),
    (
        "> a\n> > b",
        "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    ),
    ("a\n***\nb", "<p>a</p>|<hr>|<p>b</p>"),
    ("\\*no\\* ** no **", "<p>*no* ** no **</p>"),
    (
        "| a | b |\n|:-:|--:|\n| 1 | 2\\|3 |",
        f'<div class="wide"><table><thead><tr><th {CENTER}>a</th><th {RIGHT}>b</th></tr></thead>'
        f"<tbody><tr><td {CENTER}>1</td><td {RIGHT}>2|3</td></tr></tbody></table></div>",
    ),
    (
        "[x](https://a.example/b_(c)) https://b.example/d.",
        f'<p><a href="https://a.example/b_(c)" {OUT}>x</a> '
        f'<a href="https://b.example/d" {OUT}>https://b.example/d</a>.</p>',
    ),
]


def test_markdown(chat):
    for source, wanted in CASES:
        got = chat.js(
            "const m = new Markdown(); m.set(arguments[0]);"
            "return [...m.node.children].map((c) => c.innerHTML).join('|');",
            source,
        )
        assert got.replace(' class=""', "") == wanted, source
    shown = chat.js(
        "const m = new Markdown(); m.set(arguments[0]);"
        "return [...m.node.querySelectorAll('.code')].map((c) =>"
        " [c.querySelector('span').textContent, c.querySelector('code').textContent]);",
        "```py x\na < b\n\n  c\n```\n~~~\nopen",
    )
    assert shown == [["py", "a < b\n\n  c"], ["code", "open"]]


def test_it_does_not_depend_on_where_the_stream_was_cut(chat):
    for source, _ in [*CASES, ("- a\n\n  ```x\n  y\n  ```\n- b\n\nend", "")]:
        same = chat.js(
            "const grown = new Markdown(), whole = new Markdown();"
            "for (let i = 1; i <= arguments[0].length; i++) grown.set(arguments[0].slice(0, i));"
            "whole.set(arguments[0]); return grown.node.isEqualNode(whole.node);",
            source,
        )
        assert same, source


HOSTILE = (
    "[",
    "![",
    "*",
    "_a",
    "**a ",
    "*a _b ",
    "`",
    "` ``",
    "> ",
    "- ",
    "  - ",
    "[a](",
    "|",
    "~~a",
)
HOSTILE += (
    "<https://",
    "1. ",
    "# ",
    "\\",
    "| a |\n|-|\n",
    "[x](https://a.b ",
    "a\n",
    "- x\n",
    ">a\n",
)


def test_hostile_text_does_not_hang_the_page(chat):
    """Quadratic work on this much text would run into the driver's time limit for a script."""
    chat.driver.set_script_timeout(30)
    for unit in HOSTILE:
        text = unit * (200_000 // len(unit))
        shown = chat.js(
            "const m = new Markdown(); m.set(arguments[0]); return m.node.textContent.length;", text
        )
        assert shown >= 0, unit
    nested = "\n".join("  " * i + "- x" for i in range(500))
    code = "const m = new Markdown(); m.set(arguments[0]); return m.node.textContent;"
    assert chat.js(code, nested).count("x") == 500
