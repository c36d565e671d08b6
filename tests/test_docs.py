"The site: nothing is missing or leads nowhere, and the checker that says so finds planted faults"
import json, shutil, subprocess, sys
import pytest
import docs_check, site_pages
from conftest import clean_env

def test_site_of_the_repository(repo_copy):
    r = subprocess.run([sys.executable, "tests/docs_check.py"], cwd=repo_copy, env=clean_env(repo_copy),
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr[-3000:]
    assert r.stdout.splitlines()[-1].startswith("docs: ")

# ---- a made-up site

PNG = dict(output_type="display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": ["<Figure>"]}, metadata={})

def md(text): return dict(cell_type="markdown", metadata={}, source=text.splitlines(True))

def code(text, *outputs):
    found = dict(cell_type="code", metadata={}, source=text.splitlines(True))
    return found | dict(outputs=list(outputs), execution_count=None)

def front(output):
    lines = ["---\n", f"output-file: {output}\n", "title: A page\n", "\n", "---\n"]
    return dict(cell_type="raw", metadata={}, source=lines)

SITE = """
project:
  type: website
  render: ["/*.ipynb", "/attention/*.ipynb", "/figures/*.ipynb"]
website:
  sidebar:
    contents:
      - index.ipynb
      - section: "Attention"
        contents: [attention/10_favor.ipynb]
      - section: "Figures"
        contents: [figures/fig_a.ipynb]
"""

def pages():
    "Processed notebooks of a sound site, with every kind of link"
    shown = ["---\n", "\n", "### favor_attention\n", "\n", "*Linear*"]
    showdoc = dict(output_type="display_data", data={"text/markdown": shown})
    return {
        "index.ipynb": [front("index.html"), md("## Start here\n\n"
            "See [the features](attention/10_favor.ipynb#positive-features-of-q-and-k), "
            "[`favor_attention`](/attention/favor.html#favor_attention), "
            "[`Favor.redraw`](/attention/favor.html), "
            "[data](../results/rows.jsonl), [elsewhere](https://example.org/a#b), [above](#start-here), "
            "and `[no](link.ipynb)`.\n\n"
            "```python\nx = a[0](b)  # [no](no.ipynb) @fig-no\n```\n\n| [table](figures/fig_a.ipynb) | $f[x](y)$ |\n")],
        "attention/10_favor.ipynb": [front("favor.html"),
            md("## Positive features of `q` and $k$\n\n$$y = x$$ {#eq-y}\n\nFrom @eq-y and @fig-rows, mail a@fig.org. "
               "[home](../index.ipynb) [site](/) [there](../figures/fig_a.html#again-1)\n\n![one](picture.png)"),
            code("show_doc(favor_attention)", showdoc), code("#| label: fig-rows\n#| fig-cap: Rows\nplot()", PNG)],
        "figures/fig_a.ipynb": [front("fig_a.html"),
            md("## Again {#own}\n\n## Again\n\n## Again\n\n[x](#own) [y](#again)"), code("plot()", PNG)],
    }

def write(root, cells_of, yml=SITE, sources=None):
    (root/"_quarto.yml").write_text(yml)
    for folder, content in (("_proc", cells_of), ("nbs", sources or cells_of)):
        for name, cells in content.items():
            f = root/folder/name
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    (root/"_proc/attention").mkdir(exist_ok=True, parents=True)
    (root/"_proc/attention/picture.png").write_bytes(b"png")
    (root/"results").mkdir(exist_ok=True)
    (root/"results/rows.jsonl").write_text("{}\n")
    (root/"README.md").write_text("[rows](results/rows.jsonl) [site](https://example.org)\n")
    return docs_check.check_site(root, root/"_proc")

def test_sound_site_passes(tmp_path):
    rep = write(tmp_path, pages())
    assert rep.problems == []
    assert (rep.pages, rep.links, rep.images) == (3, 15, 3)
    assert str(rep) == "docs: 3 pages, 15 links, 3 images, 0 problems"

@pytest.mark.parametrize("text, said", [
    ("[x](gone.ipynb)", "link to gone.ipynb: no such page"),
    ("[x](../attention/10_favor.ipynb)", "no such page"),                      # right file, wrong place
    ("[x](attention/10_favor.html)", "no such page"),                          # the page is favor.html
    ("[x](attention/10_favor.ipynb#gone)", "attention/10_favor.ipynb has no heading #gone"),
    ("[x](#gone)", "index.ipynb has no heading #gone"),
    ("[`y`](/attention/favor.html#gone)", "has no heading #gone"),
    ("[`Favor.redraw`](/attention/favor.html#favor.redraw)", "has no heading #favor.redraw"),
    ("[x](../results/gone.jsonl)", "no such page or file"),
    ("[x](../../outside.txt)", "no such page or file"),
    ("[source](/blob/main/okadfa/core.py#L3)", "git_url"),
    ("![x](gone.png)", "link to gone.png"), ("![x](attachment:gone.png)", "no attachment"),
    ("[![x](gone.png)](index.ipynb)", "link to gone.png"), ("[x]\n\n[x]: gone.ipynb", "link to gone.ipynb"),
    ('<img src="gone.png">', "link to gone.png"),
    ("see @fig-gone", "@fig-gone has no label"), ("see [-@sec-gone]", "@sec-gone has no label"),
    ("by @eq-gone.", "@eq-gone has no label"),
    ("see @fig-rows", "@fig-rows has no label on its page"),                   # labelled on another page
    ("$$a$$ {#eq-a}\n\n$$b$$ {#eq-a}", "eq-a is given twice"),
])
def test_faults_in_prose_are_found(tmp_path, text, said):
    site = pages()
    site["index.ipynb"].append(md(text))
    rep = write(tmp_path, site)
    assert len(rep.problems) == 1 and said in rep.problems[0], rep.problems
    assert rep.problems[0].startswith("index.ipynb: ")

def plus(site, cell): return site | {"index.ipynb": site["index.ipynb"] + [cell]}

ERROR = dict(output_type="error", ename="ValueError", evalue="no", traceback=[])

@pytest.mark.parametrize("change, yml, said", [
    (lambda s: s, SITE.replace("10_favor", "11_gone.ipynb, attention/10_favor"),
     "_quarto.yml: no page attention/11_gone.ipynb"),
    (lambda s: s, SITE.replace("[figures/fig_a.ipynb]", "[]"), "figures/fig_a.ipynb: not in the sidebar"),
    (lambda s: s, SITE.replace(', "/figures/*.ipynb"', ""), "figures/fig_a.ipynb: no render glob"),
    (lambda s: s, SITE.replace("- index.ipynb", "- index.ipynb\n      - index.ipynb"), "in the sidebar twice"),
    (lambda s: {k: s[k] for k in s if k != "index.ipynb"}, SITE.replace("      - index.ipynb\n", ""),
     "index.ipynb: missing"),
    (lambda s: s | {"figures/fig_a.ipynb": s["figures/fig_a.ipynb"][:-1]}, SITE, "a figure notebook without an image"),
    (lambda s: plus(s, code("#| label: fig-x\nplot()")), SITE, "the cell labelled fig-x holds no image"),
    (lambda s: plus(s, code("1/0", ERROR)), SITE, "index.ipynb: cell 2 holds an error, ValueError: no"),
])
def test_faults_of_the_site_are_found(tmp_path, change, yml, said):
    rep = write(tmp_path, change(pages()), yml)
    assert any(said in p for p in rep.problems), rep.problems
    # A missing front page breaks the links to it as well; anything else is one fault, said once.
    assert len(rep.problems) == 1 or said == "index.ipynb: missing", rep.problems

def test_stored_and_unprocessed_notebooks_count(tmp_path):
    site = pages()
    sources = site | {"index.ipynb": [code("#| hide\n1/0", ERROR)], "attention/11_new.ipynb": [md("# New")]}
    rep = write(tmp_path, site, sources=sources)
    assert rep.problems == ["attention/11_new.ipynb: not processed",
                            "index.ipynb: stored cell 0 holds an error, ValueError: no"]

def test_front_page_links_count(tmp_path):
    write(tmp_path, pages())
    (tmp_path/"README.md").write_text("![picture](docs/gone.png)")
    rep = docs_check.check_site(tmp_path, tmp_path/"_proc")
    assert rep.problems == ["README.md: link to docs/gone.png: no such file"]

@pytest.mark.parametrize("heading, name", [
    ("Why the query's scale?", "why-the-querys-scale"), ("1. First_step - now", "first_step---now"),
    ("`FavorState.step`", "favorstate.step"), ("A [link](x.html) here", "a-link-here"), ("3", "section")])
def test_heading_ids_follow_pandoc(heading, name): assert docs_check.heading_id(heading) == name

# ---- the command

PROJECT = """[DEFAULT]
repo = made
lib_name = made
user = made
nbs_path = nbs
lib_path = made
doc_host =
doc_baseurl = /
git_url =
"""

def command(root, cells_of):
    "Exit code and lines of the check as a command, on a project with these notebooks"
    root.mkdir()
    (root/"tests").mkdir()
    for module in (docs_check, site_pages): shutil.copy(module.__file__, root/"tests")
    (root/"settings.ini").write_text(PROJECT)
    (root/"nbs").mkdir()
    named = "".join(f"\n      - {n}" for n in cells_of)
    (root/"_quarto.yml").write_text(f"project:\n  render: ['/*.ipynb']\nwebsite:\n  sidebar:\n    contents:{named}\n")
    for name, cells in cells_of.items():
        meta = dict(kernelspec=dict(name="python3", language="python"))
        nb = dict(cells=cells, metadata=meta, nbformat=4, nbformat_minor=5)
        (root/"nbs"/name).write_text(json.dumps(nb))
    r = subprocess.run([sys.executable, "tests/docs_check.py"], cwd=root, env=clean_env(root),
                       capture_output=True, text=True)
    return r.returncode, r.stdout.splitlines()

def test_command_says_what_it_counted(tmp_path):
    good = {"index.ipynb": [md("# Made\n\n> up"), md("## Here\n\n[x](00_a.ipynb)")],
            "00_a.ipynb": [md("# A\n\n> b"), md("[h](index.ipynb#here)")]}
    assert command(tmp_path/"good", good) == (0, ["docs: 2 pages, 2 links, 0 images, 0 problems"])

def test_command_names_every_notebook_that_cannot_be_processed(tmp_path):
    mixed = [md("# A\n\n> b"), code("x = 1"), code("import json\nx + 1"), code("#| export\ndef f(): pass")]
    notebooks = {"index.ipynb": [md("# Made\n\n> up")], "00_a.ipynb": mixed, "01_b.ipynb": mixed}
    rc, lines = command(tmp_path/"bad", notebooks)
    assert rc == 1 and lines[-1].endswith("2 problems")
    assert [s.split(":")[0] for s in lines[:-1]] == ["00_a.ipynb", "01_b.ipynb"]
    assert all("NameError: name 'x'" in s for s in lines[:-1])
