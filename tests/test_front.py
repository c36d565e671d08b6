"A first-time reader's questions, each answered on the front page or one click away"
import re
from pathlib import Path
import pytest
from conftest import NBS, ROOT, load, source

def text_of(path:Path, code:bool=True) -> str:
    "What a reader sees of a page: prose and printed output of a notebook, or a Markdown file"
    if path.suffix != ".ipynb": return path.read_text(encoding="utf-8")
    parts = []
    for c in load(path)["cells"]:
        if code or c["cell_type"] == "markdown": parts.append(source(c))
        parts += ["".join(o.get("text", "")) for o in c.get("outputs", [])]
    return "\n\n".join(parts)

def links(path:Path) -> dict[Path, str]:
    "Pages that a front page links to -> the heading asked for"
    found = re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", text_of(path, code=False))
    inside = [(target, anchor) for target, anchor in found if "://" not in target]
    return {(path.parent/target).resolve() if target else path.resolve(): anchor for target, anchor in inside}

FRONT_PAGES = ROOT/"README.md", NBS/"index.ipynb"

# question -> where its answer stands ("": on the front page itself), and the heading or sentence that it is
QUESTIONS = {
    "What is this?": ("", r"without backpropagation through every block, and attend without the quadratic cost"),
    "Does it work?": ("", r"## What was found[\s\S]*?\*\*(confirmed|refuted)\*\*"),
    "At which size?": ("", r"\| scope \|[\s\S]*?\d+ blocks of width \d+, [\d,]+ steps"),
    "What is new?": ("", r"## What is new here, and what is known[\s\S]*?New here, as far as we know"),
    "How do I try it?": ("", r"```sh\s+make demo "),
    "How do I use the hook on my model?": ("use/use_feedback.ipynb", r"with DFAHook\(model"),
    "How do I add a mixer?": ("extend/90_gated_delta.ipynb", r"register_mixer\("),
    "Where are the failures?": ("figures/fig_claims.ipynb", r"## Headlines of earlier impl[\s\S]*?\*\*refuted\*\*")}

def answered(page:Path, where:str, answer:str) -> str:
    "Why a question is not answered; empty where it is"
    target = page if not where else NBS/where
    if where and target.resolve() not in links(page): return f"{page.name} does not link to {where}"
    if not target.exists(): return f"{where}: no such page"
    return "" if re.search(answer, text_of(target)) else f"{target.name} does not answer"

@pytest.mark.parametrize("page", FRONT_PAGES, ids=lambda p: p.name)
@pytest.mark.parametrize("question", QUESTIONS)
def test_question_is_answered(page, question): assert answered(page, *QUESTIONS[question]) == ""

@pytest.mark.parametrize("page", FRONT_PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page):
    gone = [str(p) for p in links(page) if not p.exists()]
    assert gone == [] and len(links(page)) > 20

@pytest.mark.parametrize("page", FRONT_PAGES, ids=lambda p: p.name)
def test_both_front_pages_have_the_same_order(page):
    text = text_of(page)
    marks = ("without backpropagation", "demo.png", "## What was found", "## What is new here", "## Where to start",
             "make demo", "**Learn**", "**Results**", "**Use**", "**Reference**")
    places = [text.find(m) for m in marks]
    assert -1 not in places and places == sorted(places), dict(zip(marks, places))

def test_readme_is_short():
    assert len((ROOT/"README.md").read_text(encoding="utf-8").splitlines()) <= 160

def test_markers_of_the_readme_are_filled_by_a_notebook():
    "A table asks for its text by a marker, and some figure writes it"
    markers = re.findall(r"<!-- (\w+): written", (ROOT/"README.md").read_text(encoding="utf-8"))
    code = "\n".join(source(c) for p in (NBS/"figures").glob("*.ipynb") for c in load(p)["cells"])
    filled = set(re.findall(r'(?:README\.md", |here\.fill\()"(\w+)"', code))
    assert markers and not set(markers) - filled

def test_unanswered_questions_are_found(tmp_path):
    page = tmp_path/"page.md"; page.write_text("# Nothing\n")
    assert "does not answer" in answered(page, "", "## What was found")
    assert "does not link" in answered(page, "use/use_feedback.ipynb", "x")
