"""What happens to a page between nbdev and quarto. Quarto runs this before it renders (`pre-render` in _quarto.yml), in
the folder of processed notebooks; docs_check.py does where there is no quarto. Nothing but the standard library.

Numbers of papers become links, nbdev's links go out of signatures, the source below a signature is folded and does not
repeat it, coloured outputs become plain ones, brackets stay large, and LOG.md and CHANGELOG.md become pages.
What it has done it leaves alone."""
import ast, json, re, sys, textwrap
from pathlib import Path

# ---- prose

# Code, maths, links, tags and addresses: nothing in them is touched.
KEPT = re.compile(r"(```.*?```|~~~.*?~~~|`[^`\n]+`|\$\$.*?\$\$|(?<![\\$\w])\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|<[^>\n]*>"
                  r"|https?://\S+)", re.S)
PAPERS = [(re.compile(r"\barXiv[: ]\s?(\d{4}\.\d{4,5})(?:v\d)?\b", re.I), "https://arxiv.org/abs/"),
          (re.compile(r"\bdoi[: ]\s?(10\.\d{4,}/[^\s,;)\]]*[^\s,;.)\]])", re.I), "https://doi.org/")]

def link_papers(md:str) -> str:
    "Links on the numbers of papers in markdown: `arXiv 2009.14794`, `doi:10.1000/182`"
    def linked(text):
        for number, address in PAPERS: text = number.sub(lambda m: f"[{m[0]}]({address}{m[1]})", text)
        return text
    return "".join(s if i % 2 else linked(s) for i, s in enumerate(KEPT.split(md)))

LINK = re.compile(r"\[(`?[^\[\]\n`]+`?)\]\((?:/|https?:)[^)\s]*\)")

# A link within the text of a link
NESTED = re.compile(r"(?<!!)\[([^\[\]]*)\[(`[^`\]]+`)\]\([^)\s]*\)([^\[\]]*)\]\(")

def plain_names(md:str) -> str:
    "Names that nbdev made links where there can be none, in code and within a link, are names again"
    md = re.sub(r"```.*?```", lambda m: LINK.sub(r"\1", m[0]), md, flags=re.S)
    return NESTED.sub(r"[\1\2\3](", md)

# ---- formulas

SIZED = re.compile(r"(\\[bB]ig+[lr]?\s*(?:[)\]|]|\\(?:[a-zA-Z]+|[}|])))\s*(?=[\^_])")

def free_brackets(md:str) -> str:
    "A bracket given a size by hand keeps it in browsers if no index hangs on it: the index hangs on nothing, beside it"
    return SIZED.sub(r"\1{}", md)

# ---- source below its signature

def bare(args:ast.arguments) -> ast.arguments:
    "Parameters without annotations"
    for a in ast.walk(args):
        if isinstance(a, ast.arg): a.annotation = None
    return args

def body_start(node:ast.AST, documented:bool) -> int:
    "First line of a function's or class's body, behind its docstring where that is shown elsewhere"
    first, *rest = node.body
    doc = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    return rest[0].lineno if doc and rest and documented else first.lineno

def short_source(source:str, names:set[str], width:int=90) -> str:
    "Source with each signature that stands above it, in full with its comments, reduced to the names of its parameters"
    try: tree = ast.parse(source)
    except SyntaxError: return source
    lines, cuts = source.splitlines(), []
    for top in tree.body:
        if getattr(top, "name", None) not in names: continue
        init = [n for n in top.body if getattr(n, "name", "") == "__init__"] if isinstance(top, ast.ClassDef) else []
        for node in [top, *init]:
            start = body_start(node, node is top)
            if start <= node.lineno: continue                     # all on one line
            head = lines[node.lineno-1:node.body[0].lineno-1]
            if isinstance(node, ast.FunctionDef) and len(head) > 1:
                pad = " "*(node.col_offset + 8)
                text = f"def {node.name}({ast.unparse(bare(node.args))}):"
                head = textwrap.wrap(text, width, initial_indent=" "*node.col_offset, subsequent_indent=pad,
                                     break_long_words=False, break_on_hyphens=False)
            # A comment between docstring and body stays.
            while start > node.body[0].end_lineno + 1 and lines[start-2].strip().startswith("#"): start -= 1
            cuts.append((node.lineno-1, start-1, head))
    for a, b, head in sorted(cuts, reverse=True): lines[a:b] = head
    return "\n".join(lines)

# ---- links that nbdev makes of names

def headings(cells:list[dict]) -> set[str]:
    "Anchors of the names that a page documents"
    shown = ("".join(o.get("data", {}).get("text/markdown", "")) for c in cells for o in c.get("outputs", []))
    return {name.lower() for md in shown for name in re.findall(r"^#{2,6} ([\w.]+)\s*$", md, flags=re.M)}

NAMED = re.compile(r"\]\((/[\w/.-]+\.html)#([\w.]+)\)")

def to_headings(md:str, anchors:dict[str, set]) -> str:
    "`Class.method` and `_private` lead to the class or the page where they have no heading of their own"
    def mended(m):
        page, anchor = m.groups()
        known = anchors.get(page, {anchor})
        there = [a for a in (anchor, anchor.split(".")[0]) if a in known]
        return f"]({page}#{there[0]})" if there else f"]({page})"
    return NAMED.sub(mended, md)

def lines_of(text:str) -> list[str]: return text.splitlines(True)        # quarto reads no other form

def prose(md:str, anchors:dict[str, set]) -> list[str]:
    return lines_of(link_papers(to_headings(plain_names(free_brackets(md)), anchors)))

ANSI = re.compile(r"\x1b\[[0-9;]*m")

def without_scripts(data:dict) -> None:
    """Keep an output from bringing scripts of others: for `text/html` quarto asks a server for two libraries of
    widgets. Coloured text, whose colours know of no theme, becomes plain; other HTML is said to be markup"""
    html = "".join(data.get("text/html", ""))
    if not html or "<script" in html: return
    del data["text/html"]
    if "text/plain" in data: data["text/plain"] = lines_of(ANSI.sub("", "".join(data["text/plain"])))
    if not html.lstrip().startswith("<pre") or "text/plain" not in data:
        data["text/markdown"] = lines_of(f"```{{=html}}\n{html}\n```\n")

SUMMARY = '#| code-fold: show\n#| code-summary: "Exported source"\n'
FOLDED = '#| code-fold: true\n#| code-summary: "Source"\n'

def polish(cells:list[dict], anchors:dict[str, set]) -> None:
    "Change the cells of a processed notebook in place. `anchors`: the headings of each page"
    shown = set()
    for c in cells:
        joined = "".join(c["source"])
        if c["cell_type"] == "markdown": c["source"] = prose(joined, anchors)
        for o in c.get("outputs", []):
            without_scripts(o.get("data", {}))
            md = "".join(o.get("data", {}).get("text/markdown", ""))
            if md: o["data"]["text/markdown"] = prose(md, anchors)
        if found := re.search(r"^show_doc\((\w+)", joined, flags=re.M): shown.add(found[1])
        if c["cell_type"] == "code" and joined.startswith(SUMMARY):
            c["source"] = lines_of(FOLDED + short_source(joined[len(SUMMARY):], shown))

# ---- files of the repository that are pages

PAGES = {"LOG.md": ("log.md", "Log"), "CHANGELOG.md": ("changelog.md", "Changelog")}

def page_of(text:str, title:str) -> str:
    "A markdown file of the repository as a page: front matter for its heading, links from the notebooks' folder"
    text = re.sub(r"\A# .*\n", "", text)
    text = re.sub(r"\]\(nbs/", "](", text)
    for name, (page, _) in PAGES.items(): text = text.replace(f"]({name})", f"]({page})")
    return f"---\ntitle: {title}\ntoc-depth: 2\n---\n{link_papers(text)}"

def address(name:Path, cells:list[dict]) -> str:
    "Where the site has a notebook's page, by its front matter"
    said = re.search(r"^output-file: (\S+)", "".join(cells[0]["source"]) if cells else "", flags=re.M)
    return "/" + name.with_name(said[1] if said else f"{name.stem}.html").as_posix()

def prepare(root:Path, proc:Path) -> None:
    "Polish every processed notebook in `proc` and write the pages that are no notebooks"
    files = [f for f in sorted(proc.rglob("*.ipynb")) if "_docs" not in f.parts]
    notebooks = {f: json.loads(f.read_text(encoding="utf-8")) for f in files}
    anchors = {address(f.relative_to(proc), nb["cells"]): headings(nb["cells"]) for f, nb in notebooks.items()}
    for f, nb in notebooks.items():
        old = json.dumps(nb)
        polish(nb["cells"], anchors)
        if json.dumps(nb) != old: f.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, (page, title) in PAGES.items():
        if (root/name).exists(): (proc/page).write_text(page_of((root/name).read_text("utf-8"), title), "utf-8")

if __name__ == "__main__":
    here = Path(__file__).resolve().parents[1]
    prepare(here, here/"_proc")
    sys.exit(0)
