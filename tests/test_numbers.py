"Nothing is typed by hand that results/ knows: in README, the front page, the claims, and what is to be remembered"
import re
from pathlib import Path
import pytest
from conftest import NBS, ROOT, load, source

# A figure that somebody measured: a decimal, a percentage, a multiple, a fraction in words. Whole numbers alone are
# sizes (blocks, steps, seeds), which a reader needs to be told and which no run finds out.
MEASURED = re.compile(r"""
    (?<![\w.$^_-])[-+]?\d[\d,]*\.\d+\s?%?                                                    # 1.506
  | (?<![\w.$^_-])[-+]?\d[\d,]*\s?(?:%|percent\b|x\b|times\b(?!\s+\d))                       # 55%, 10x, 15 times
  | \b(?:hundredths?|thousandths?|tenths?|fifths?|sixths?|eighths?|quarters?\ of)\b          # a hundredth
  | \b(?:two|three|four|five|six|seven|eight|nine|ten|twenty)(?:-?fold|\ times)\b            # sixfold, ten times
  | \b(?:two|three|four|five|six|seven|eight|nine|ten)-\ to\ \w+fold\b""", re.X | re.I)

GENERATED = re.compile(r"<!-- (\w+):[^\n]*-->\n.*?<!-- /\1 -->", re.S)

def prose(text:str) -> str:
    "Markdown without what is generated, code, formulas, and the targets of links"
    for what in (GENERATED, re.compile(r"```.*?```", re.S), re.compile(r"\$\$.*?\$\$", re.S),
                 re.compile(r"\$[^$\n]+\$"), re.compile(r"`[^`\n]*`")): text = what.sub(" ", text)
    return re.sub(r"\]\([^)]*\)", "]", text)

def measured(text:str) -> list[str]:
    "Figures typed by hand in a Markdown text"
    return [m[0].strip() for m in MEASURED.finditer(prose(text))]

def to_remember(nb:Path) -> str:
    "Markdown of a notebook's section *What to remember*; what its cells print is generated and does not count"
    text, inside = [], False
    for c in load(nb)["cells"]:
        if c["cell_type"] != "markdown": continue
        for line in source(c).splitlines():
            if line.startswith("#"): inside = line.lstrip("# ").startswith("What to remember")
            if inside: text.append(line)
    return "\n".join(text)

FIGURES = sorted(p.relative_to(NBS) for p in (NBS/"figures").glob("fig_*.ipynb"))

# Figures that no row knows, with the reason. A new one needs a reason, too.
CONSTANTS = {
    "README.md": {"3.11": "the oldest Python", "2.0": "the licence"}}

def by_hand(page:str, text:str) -> list[str]: return [x for x in measured(text) if x not in CONSTANTS.get(page, {})]

def test_readme_has_no_figure_by_hand():
    assert by_hand("README.md", (ROOT/"README.md").read_text(encoding="utf-8")) == []

def test_front_page_has_no_figure_by_hand():
    text = "\n\n".join(source(c) for c in load(Path("index.ipynb"))["cells"] if c["cell_type"] == "markdown")
    assert by_hand("index.ipynb", text) == []

@pytest.mark.parametrize("nb", FIGURES, ids=str)
def test_nothing_to_remember_is_typed_by_hand(nb): assert by_hand(str(nb), to_remember(nb)) == []

def test_constants_are_there():
    "A constant that no page says any more leaves the list"
    for page, known in CONSTANTS.items():
        text = (ROOT/page).read_text(encoding="utf-8") if page.endswith(".md") else to_remember(Path(page))
        assert set(known) <= set(measured(text)), page

def test_claims_are_sentences_without_measurements():
    "A statement may name the figure that was promised, a length or a size; the number beside it comes from rows"
    from okadfa.run.headlines import CLAIMS
    for name, claim in CLAIMS.items():
        promised = {f"{claim.aim:g}", f"{100*claim.aim:g}%", f"{100*(claim.aim - 1):g}%", f"{claim.aim:g} times"}
        left = [x for x in measured(claim.statement) if x not in promised | {"5.33"}]     # 12 bits for 64
        assert left == [], (name, left)

@pytest.mark.parametrize("text,found", [
    ("It costs 0.25 bits.", ["0.25"]), ("closes 55% of it", ["55%"]), ("is 10x as fast", ["10x"]),
    ("15 times", ["15 times"]), ("within a hundredth", ["hundredth"]), ("five- to sixfold", ["five- to sixfold"]),
    ("eight times better", ["eight times"]),
    ("24 blocks, 2,000 steps, three seeds", []), ("`--lr 0.003` and $m=0.5d$", []), ("half a round", []),
    ("[rules](fig_1.5.ipynb)", []), ("```sh\nokadfa --lr 2e-3 0.5\n```", []),
    ("<!-- x: made -->\n| 1.5 |\n<!-- /x -->", []), ("<!-- x: made -->\n| 1.5 |", ["1.5"])])
def test_figures_by_hand_are_found(text, found): assert measured(text) == found
