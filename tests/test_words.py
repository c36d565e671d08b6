"The glossary has every word of the tables, the references have every source"
import re
import pytest
from conftest import NBS, ROOT, load, notebooks, source
from docs_check import links_of, without_code

def prose_of(nb) -> str: return "\n\n".join(source(c) for c in load(nb)["cells"] if c["cell_type"] == "markdown")

# ---- words

def terms(text:str) -> dict:
    "Term -> its sentence; an entry may have several names: `- **a**, **b**: sentence`"
    found = {}
    for names, said in re.findall(r"^- ((?:\*\*[^*]+\*\*(?:, )?)+): (.+)$", text, flags=re.M):
        for name in re.findall(r"\*\*([^*]+)\*\*", names):
            assert name.lower() not in found, f"{name} is explained twice"
            found[name.lower()] = said
    return found

def headers(md:str) -> list[str]:
    "Cells of the first lines of all tables"
    lines = md.splitlines()
    tops = [a for a, b in zip(lines, lines[1:]) if re.fullmatch(r"\|[ :\-|]+\|", b)]
    cells = [cell.strip() for line in tops for cell in line.strip("|").split("|")]
    return [cell for cell in cells if cell and not re.fullmatch(r"[\d,]+ (bytes|tokens)", cell)]

def legend(md:str) -> list[str]:
    "Words in italics, but for emphasis in a sentence and for this project's name"
    return [w for w in re.findall(r"(?<!\*)\*([A-Za-z][^*\n]{2,40})\*(?!\*)", md) if w not in EMPHASIS]

EMPHASIS = "pretrained", "trained", "okadfa", "New here, as far as we know"

def key(word:str) -> str:
    "A header as the glossary has it: without units, lengths and markup"
    word = re.sub(r"\(.*?\)|[*`]|, [\d,]+ tokens$| at [\d,]+$", "", word.replace("&nbsp;", " ")).strip().lower()
    return re.sub(r"\s+", " ", word)

GLOSSARY, REFERENCES = "glossary.ipynb", "references.ipynb"

def missing_words(md:str) -> list[str]:
    known = terms(prose_of(GLOSSARY))
    words = (w for w in headers(md) + legend(md) if not re.fullmatch(r"[\d,]+ (bytes|tokens|steps)", w))
    return sorted({w for w in words if key(w) not in known})

def test_the_glossary_has_every_word_of_the_tables():
    assert missing_words((ROOT/"README.md").read_text(encoding="utf-8")) == []

def test_a_word_without_an_entry_is_found():
    table = "| bits per byte | qualm |\n| ---: | --- |\n\n*Worst block* is, *zeal* is not"
    assert missing_words(table) == ["qualm", "zeal"]

def test_every_word_has_a_page():
    for word, said in terms(prose_of(GLOSSARY)).items():
        assert links_of(without_code(said)), f"{word} has no link"
        assert said.count(". ") <= 4, f"{word} takes more than a few sentences"

@pytest.mark.parametrize("name", [GLOSSARY, REFERENCES])
def test_links_lead_to_pages(name):
    links = [u for _, u in links_of(without_code(prose_of(name)))]
    assert len(links) > 40
    lost = [u for u in links if not u.startswith("https://") and not (NBS/u.partition("#")[0]).exists()]
    assert lost == []

# ---- sources

NUMBER = re.compile(r"(?:arxiv(?:\.org)?(?:/abs/|/pdf/|[:\s]+))(\d{4}\.\d{4,5}|[a-z-]+/\d{7})", re.I)

def texts():
    "(where, text) of everything that may name a source"
    for nb in notebooks():
        if str(nb) != REFERENCES: yield str(nb), "\n".join(map(source, load(nb)["cells"]))
    for name in ("README.md", "LOG.md", "CHANGELOG.md", "CONTRIBUTING.md"):
        yield name, (ROOT/name).read_text(encoding="utf-8")

def test_every_number_stands_among_the_references():
    listed = set(NUMBER.findall(prose_of(REFERENCES)))
    lost = [(where, n) for where, text in texts() for n in NUMBER.findall(text) if n not in listed]
    assert len(listed) > 40 and lost == []

def cited(text:str) -> set:
    "(first author, year) of what looks like a citation: Author et al. 2021, Author and Author (1994), Author (2016)"
    name, year = r"([A-ZÀ-Þ][\wÀ-ÿ]+)", r",? \(?((?:19|20)\d\d)"
    other = name[1:-1]
    named = re.findall(rf"{name} et al\.{year}", text)
    pairs = re.findall(rf"{name}(?:, {other})* (?:and|&) {other}{year}", text)
    return set(named + pairs + re.findall(rf"\b(Nøkland|Wilson|Mezzadri|Duda|Owen|Kung){year}", text))

def test_every_citation_stands_among_the_references():
    listed = prose_of(REFERENCES)
    def known(author, year):
        return any(re.search(rf"\b{author}\b", line) and year in line for line in listed.splitlines())
    found = [(where, *c) for where, text in texts() for c in cited(text)]
    assert len({c[1:] for c in found}) > 35
    assert [c for c in found if not known(*c[1:])] == []

def test_every_source_has_its_mark():
    entries = [s for s in prose_of(REFERENCES).splitlines() if s.startswith("- ") and not s.startswith("- **")]
    without = [s for s in entries if not re.search(r"\*(Known|Adapted|New)\*|\*(known|adapted|new)\*", s)]
    assert len(entries) > 50 and without == []
