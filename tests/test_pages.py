"""The pages as a browser shows them: the checker finds planted faults, and the site's settings make sound pages.

Both need Chromium and playwright, the second quarto as well, and are skipped with the reason where there is none.
`make docs` looks at every page of the site."""
import json, shutil, subprocess, sys
import pytest
import pages_check, site_pages
from conftest import ROOT

WHY_NOT = pages_check.why_not()
looks = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "")

# ---- made-up pages

PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title><link rel="icon" href="a.svg">
<meta property="og:title" content="t"><style>{style}
body.quarto-dark {{ background: #111; color: #ddd }} body {{ background: #fff; color: #222; margin: 0 }}
body.quarto-dark a {{ color: #9cf }}</style>
<script>window.quartoToggleColorScheme = () => document.body.classList.toggle('quarto-dark')</script>{head}</head>
<body><main><h1 id="top">A page</h1><p>Some words.</p>{body}</main></body></html>"""

SEARCH = [{"href": "index.html", "title": "A page", "text": "Some words."}]

@pytest.fixture(scope="module")
def chromium():
    with pages_check.browser() as b: yield b

def site(folder, chromium, body="", head="", style="", search=SEARCH):
    (folder/"index.html").write_text(PAGE.format(body=body, head=head, style=style))
    (folder/"other.html").write_text(PAGE.format(body="", head="", style=""))
    (folder/"a.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    (folder/"search.json").write_text(json.dumps(search))
    return pages_check.check_pages(folder, chromium=chromium)

SOUND = """<p>See <a href="other.html#top">another</a>, <a href="#top">above</a>,
<a href="https://example.org/x">far</a>.</p><table><tr><td><p>x</p></td></tr></table><img src="a.svg" alt="A square">
<pre>[a](not/shown.html) | b |</pre>"""

@looks
def test_sound_pages_pass(tmp_path, chromium):
    rep = site(tmp_path, chromium, SOUND)
    assert rep.problems == [] and (rep.pages, rep.links, rep.images) == (2, 3, 1)

@looks
@pytest.mark.parametrize("parts, said", [
    (dict(body="<p>s</p>"), 'a paragraph of one letter, "s"'),
    (dict(body="<h2>" + "word "*40 + "</h2>"), "a heading of 199 characters"),
    (dict(body="<div class='cell-output'><pre>| a | b |\n|---|--:|\n| 1 | 2 |</pre></div>"), "a table as raw text"),
    (dict(body="<p>see [`f`](/x/y.html#f)</p>"), "a link as raw text: [`f`](/x/y.html#f)"),
    (dict(body="<img src='a.svg'>"), "a picture without words"),
    (dict(body="<img src='a.svg' alt=' '>"), "a picture without words"),
    (dict(body="<a href='gone.html'>x</a>"), "link to gone.html: no such page or file"),
    (dict(body="<a href='../outside.html'>x</a>"), "no such page or file"),
    (dict(body="<a href='other.html#gone'>x</a>"), "link to other.html#gone: other.html has no #gone"),
    (dict(body="<a href='#gone'>x</a>"), "index.html has no #gone"),
    (dict(body="<div style='width: 500px'>wide</div>"), '500 px wide on a screen of 390: div "wide"'),
    (dict(body="<p style='color: #999'>pale</p>"), "light: contrast 2.85"),
    (dict(body="<p style='color: #222'>dim</p>"), "dark: contrast 1.19"),
    (dict(body="<p style='opacity: .4'>faint</p>"), "contrast"),
    (dict(body="<p><code style='background: #ddd; color: #d63384'>code</code></p>"), "contrast 3."),
    (dict(head="<script src='https://cdn.example.org/x.js'></script>"), "asks cdn.example.org"),
    (dict(style="@import url('https://fonts.example.org/css');"), "asks fonts.example.org"),
    (dict(head="<link rel='stylesheet' href='gone.css'>"), "no file /gone.css"),
    (dict(head="<script>console.error('oh no')</script>"), "console: oh no"),
    (dict(head="<script>nothing.there</script>"), "script error"),
    (dict(head="<script>delete window.quartoToggleColorScheme</script>"), "no dark theme"),
    (dict(search=[{"href": "a.html#b", "title": "b", "text": "[`f`](/x.html#f)"}]), "search.json: a link as raw text"),
])
def test_faults_are_found(tmp_path, chromium, parts, said):
    rep = site(tmp_path, chromium, **parts)
    assert rep.problems and all(said in p for p in rep.problems), rep.problems

@looks
def test_what_scrolls_by_itself_is_not_wide(tmp_path, chromium):
    body = "<div style='overflow-x: auto'><div style='width: 900px'>x</div></div>"
    assert site(tmp_path, chromium, body).problems == []

@looks
def test_pictures_of_pages_are_written(tmp_path, chromium):
    site(tmp_path, chromium)
    pages_check.check_pages(tmp_path, "index.html", tmp_path/"shots", chromium=chromium)
    found = {p.name for p in (tmp_path/"shots").iterdir()}
    assert found == {f"index-{size}-{colour}.png" for size in ("desktop", "phone") for colour in ("light", "dark")}

@looks
def test_command(tmp_path, chromium):
    site(tmp_path, chromium, "<p>s</p>")
    run = [sys.executable, str(ROOT/"tests/pages_check.py")]
    r = subprocess.run([*run, str(tmp_path)], capture_output=True, text=True)
    assert r.returncode == 1 and r.stdout.splitlines()[-1] == "pages: 2 pages, 0 links, 0 images, 1 problems"
    r = subprocess.run([*run, str(tmp_path/"none"), "--need"], capture_output=True, text=True)
    assert r.returncode == 1 and r.stdout.startswith("pages: not looked at, no site in none")

# ---- what is done to processed notebooks

def code(text): return dict(cell_type="code", metadata={}, source=text.splitlines(True), outputs=[])

def showdoc(name, text):
    out = dict(output_type="execute_result", data={"text/markdown": text.splitlines(True)})
    return code(f"#| echo: false\nshow_doc({name})") | dict(outputs=[out])

EXPORTS = site_pages.SUMMARY + '''def f(
    x:int,        # what goes in
    *,
    y:float=.5,   # how much of it
) -> float:       # what comes out
    "Some of x"
    # half of it, mostly
    return x*y

def g(z): return z'''

def test_source_below_its_signature_is_folded_and_does_not_repeat_it():
    cells = [showdoc("f", "### f\n\n*Some of x*"), code(EXPORTS)]
    site_pages.polish(cells, {})
    want = site_pages.FOLDED + "def f(x, *, y=0.5):\n    # half of it, mostly\n    return x*y\n\ndef g(z): return z"
    assert "".join(cells[1]["source"]) == want
    again = json.loads(json.dumps(cells))
    site_pages.polish(again, {})
    assert again == cells

def test_source_whose_signature_is_not_shown_stays_whole():
    cells = [code(EXPORTS)]
    site_pages.polish(cells, {})
    assert "".join(cells[0]["source"]) == EXPORTS.replace(site_pages.SUMMARY, site_pages.FOLDED)

def test_a_class_loses_docstring_and_the_signature_of_its_init():
    source = 'class A(B):\n    "An A"\n    def __init__(self,\n        n:int=1,   # how many\n    ):\n' \
             '        "Make it"\n        self.n = n\n\n    def f(self, x:int): return x'
    want = "class A(B):\n    def __init__(self, n=1):\n        \"Make it\"\n        self.n = n\n\n" \
           "    def f(self, x:int): return x"
    assert site_pages.short_source(source, {"A"}) == want

@pytest.mark.parametrize("text, want", [
    ("arXiv 2009.14794.", "[arXiv 2009.14794](https://arxiv.org/abs/2009.14794)."),
    ("(arXiv:2312.04927v2)", "([arXiv:2312.04927v2](https://arxiv.org/abs/2312.04927))"),
    ("doi:10.1000/182, p. 3", "[doi:10.1000/182](https://doi.org/10.1000/182), p. 3"),
    ("`arXiv 2009.14794` $arXiv 2009.14794$", None), ("[arXiv 2009.14794](x.html)", None),
    ("```\narXiv 2009.14794\n```", None), ("version 2009.14794", None), ("https://x.org/arXiv:2009.14794", None)])
def test_numbers_of_papers_are_links(text, want):
    assert site_pages.link_papers(text) == (want or text)
    assert site_pages.link_papers(site_pages.link_papers(text)) == (want or text)

@pytest.mark.parametrize("text, want", [
    (r"\Big(x\Big)^{\!\top}e", r"\Big(x\Big){}^{\!\top}e"), (r"\bigl[x\bigr]_0^1", r"\bigl[x\bigr]{}_0^1"),
    (r"\Big\lVert x\Big\rVert^2", r"\Big\lVert x\Big\rVert{}^2"), (r"\left(x\right)^2 \big(x\big) y^2", None)])
def test_brackets_of_a_size_carry_no_index(text, want):
    assert site_pages.free_brackets(text) == (want or text)
    assert site_pages.free_brackets(want or text) == (want or text)

def test_outputs_bring_no_scripts_of_others():
    rich = {"text/html": ["<pre style='color: red'>a</pre>\n"], "text/plain": ["\x1b[1ma\x1b[0m"]}
    table = {"text/html": "<table></table>", "text/plain": ["a"]}
    for data in (rich, table): site_pages.without_scripts(data)
    assert rich == {"text/plain": ["a"]}
    assert table["text/markdown"][1:] == ["<table></table>\n", "```\n"] and "text/html" not in table

def test_links_where_there_can_be_none_are_names_again():
    md = "```python\ndef f(x:[`A`](/a.html#a)):\n```\nsee [`A`](/a.html#a), [bytes of [`A`](/a.html#a)](b.ipynb)"
    want = "```python\ndef f(x:`A`):\n```\nsee [`A`](/a.html#a), [bytes of `A`](b.ipynb)"
    assert site_pages.plain_names(md) == want

def test_names_without_a_heading_lead_to_what_has_one():
    anchors = {"/a.html": {"a", "a.g"}}
    md = "[`A.f`](/a.html#a.f) [`A.g`](/a.html#a.g) [`_h`](/a.html#_h) [x](/b.html#b.c)"
    assert site_pages.to_headings(md, anchors) == \
        "[`A.f`](/a.html#a) [`A.g`](/a.html#a.g) [`_h`](/a.html) [x](/b.html#b.c)"

def test_a_file_of_the_repository_becomes_a_page():
    text = "# Log\n\nSee [there](nbs/dfa/05_law.ipynb) and [here](CHANGELOG.md).\n"
    assert site_pages.page_of(text, "Log").endswith("\n\nSee [there](dfa/05_law.ipynb) and [here](changelog.md).\n")
    assert site_pages.page_of(text, "Log").startswith("---\ntitle: Log\n")

# ---- the site's own settings

@looks
@pytest.mark.skipif(not shutil.which("quarto"), reason="quarto is not on PATH")
def test_settings_make_sound_pages(tmp_path, chromium):
    "Quarto, with the settings of the site, makes of every kind of cell a page that passes"
    proc = tmp_path/"_proc"
    shutil.copytree(ROOT/"nbs/styles", proc/"styles")
    (tmp_path/"tests").mkdir()
    shutil.copy(site_pages.__file__, tmp_path/"tests")
    (proc/"nbdev.yml").write_text("project: {output-dir: _docs}\n")
    (tmp_path/"LOG.md").write_text("# Log\n\nWhat was tried.\n\n## A day\n\nIt failed, see arXiv 2009.14794.\n")
    (proc/"figures").mkdir()
    shutil.copy(ROOT/"nbs/figures/demo.png", proc/"figures")
    settings = (ROOT/"_quarto.yml").read_text(encoding="utf-8")
    head, tail = settings[:settings.index("      - index.ipynb")], "\nmetadata-files: [nbdev.yml]\n"
    (proc/"_quarto.yml").write_text(head + "      - index.ipynb\n      - log.md\n" + tail)
    front = dict(cell_type="raw", metadata={}, source=["---\n", "title: A page\n", "description: One line\n", "---\n"])
    table = "| " + " | ".join(f"column {i}" for i in range(12)) + " |\n" + "|---:"*12 + "|\n" + "| 1.25 "*12 + "|"
    prose = f"## Wide things\n\n$$\\left(\\frac{{{'x+'*60}y}}{{z}}\\right)$$\n\n{table}\n\n[`f`](log.md) and `code`."
    wide = code('#| label: x\nprint("y"*200)')
    coloured = {"text/html": ["<pre><span style='color: #008000'>a</span></pre>\n"], "text/plain": ["a"]}
    wide["outputs"] = [dict(output_type="stream", name="stdout", text=["y"*200 + "\n"]),
                       dict(output_type="display_data", metadata={}, data=coloured)]
    shown = showdoc("f", "---\n\n### f\n\n```python\ndef f(x:[`A`](/a.html#a)):\n```\n\n*Some of x*")
    written = dict(cell_type="markdown", metadata={}, source=prose.splitlines(True))
    cells = [front, written, shown, code(EXPORTS), wide]
    cells = [c | dict(id=f"c{i}") for i, c in enumerate(cells)]
    kernel = dict(kernelspec=dict(name="python3", language="python", display_name="python3"))
    (proc/"index.ipynb").write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    r = subprocess.run(["quarto", "render", "--no-cache"], cwd=proc, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr[-3000:]
    rep = pages_check.check_pages(proc/"_docs", chromium=chromium)
    assert rep.problems == [] and rep.pages == 2
    page = (proc/"_docs/index.html").read_text(encoding="utf-8")
    assert "<math" in page and 'class="code-fold"' in page and "/_docs" not in page
    assert 'href="https://arxiv.org/abs/2009.14794"' in (proc/"_docs/log.html").read_text(encoding="utf-8")
