"Nothing is typed by hand that results/ knows: README, the front page, the claims, and what figures ask to be remembered"
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
