"""Check the documentation site: `python tests/docs_check.py [--build]`

With `--build` and quarto on PATH the site is built by nbdev_docs first. Without, the notebooks are processed as
nbdev does for quarto, and what they hold is checked: sidebar, links, cross-references, pictures and errors.
One line per problem, exit code 1."""
import argparse, contextlib, fnmatch, json, os, re, shutil, subprocess, sys, warnings
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote
import yaml
import site_pages

@dataclass
class Report:
    "What was counted and what is wrong"
    of:str = "docs"
    pages:int = 0
    links:int = 0
    images:int = 0
    problems:list[str] = field(default_factory=list)
    def __str__(self):
        return f"{self.of}: {self.pages} pages, {self.links} links, {self.images} images, {len(self.problems)} problems"

# ---- reading a processed notebook

def joined(x) -> str: return x if isinstance(x, str) else "".join(map(str, x))

FENCED = re.compile(r"^([ \t]*)(`{3,}|~{3,}).*?^[ \t]*\2[`~]*[ \t]*$", re.M | re.S)

def without_code(md:str) -> str:
    "Markdown without fenced blocks, inline code and maths, where brackets and `@` mean something else; line count kept"
    md = FENCED.sub(lambda m: "\n"*m.group().count("\n"), md)
    md = re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", md, flags=re.S)
    # the label behind a display formula stays
    md = re.sub(r"\$\$.*?\$\$", "", md, flags=re.S)
    return re.sub(r"(?<![\\$\w])\$(?=\S)[^$\n]*?(?<=\S)\$(?!\d)", "", md)

def heading_id(text:str) -> str:
    "Pandoc's automatic identifier of a heading"
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)   # a link counts by its text
    text = re.sub(r"[^\w\s.\-]", "", text.lower())
    return re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", text.strip())) or "section"

def links_of(plain:str) -> list[tuple[str, str]]:
    "(`!` for a picture, target) of every link in markdown without code: inline, by reference, or as HTML"
    # A picture may itself be a link's text, so it is looked for first.
    out = [("!", u) for u in re.findall(r"!\[[^\]]*\]\(<?([^)\s>]+)", plain)]
    plain = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", plain)
    out += [("", u) for u in re.findall(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?([^)\s>]+)", plain)]
    out += [("", u) for u in re.findall(r"^ {0,3}\[[^\]^]+\]:\s+<?([^\s>]+)", plain, flags=re.M)]
    return out + [("!" if k == "src" else "", u) for k, u in re.findall(r"\b(href|src)=[\"']([^\"']+)", plain)]

def is_picture(data:dict) -> bool:
    "Whether an output's data, by kind, hold a picture"
    return any(k.startswith("image/") for k in data) or "<svg" in joined(data.get("text/html", ""))

LABEL = r"((?:fig|sec|eq|tbl|lst)-[\w:-]+)"

class Page:
    "A processed notebook: prose, outputs, the anchors it offers and the links and references it makes"
    def __init__(self, path:Path, root:Path):
        self.path, self.name = path, PurePosixPath(path.relative_to(root).as_posix())
        self.cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        self.front, self.prose, self.images, self.errors = {}, [], 0, []
        self.labels, self.attachments, self.pictures_of = [], set(), {}
        for i, c in enumerate(self.cells):
            src = joined(c["source"])
            if c["cell_type"] == "raw" and src.startswith("---"):
                self.front |= yaml.safe_load(src.strip().strip("-")) or {}
            if c["cell_type"] == "markdown": self.prose.append(src); self.attachments |= set(c.get("attachments", {}))
            if c["cell_type"] != "code": continue
            outs = c.get("outputs", [])
            shown = [o.get("data", {}) for o in outs]
            pictures = sum(map(is_picture, shown))
            self.images += pictures
            for label in re.findall(r"^\s*#\s*\|\s*label\s*:\s*[\"']?([\w:-]+)", src, flags=re.M):
                self.labels.append(label); self.pictures_of[label] = pictures
            for o in outs:
                self.prose.append(joined(o.get("data", {}).get("text/markdown", "")))
                if o["output_type"] != "error": continue
                self.errors.append(f"cell {i} holds an error, {o.get('ename')}: {o.get('evalue')}")
        self.html = str(self.name.with_name(self.front.get("output-file", f"{self.name.stem}.html")))
        plain = [without_code(p) for p in self.prose]
        self.labels += [x for p in plain for x in re.findall(r"\{[^}\n]*#" + LABEL, p)]
        self.refs = [x.rstrip(":-") for p in plain for x in re.findall(r"(?<![\w@\\])@" + LABEL, p)]
        self.links = links_of("\n\n".join(plain))
        self.anchors = self._anchors()

    def _anchors(self) -> set[str]:
        out = set(self.labels)
        for md in self.prose:
            # headings keep their inline code, so only the fences go
            md = FENCED.sub("", md)
            out |= set(re.findall(r"\bid=[\"']([^\"']+)", md)) | set(re.findall(r"\{[^}\n]*#([\w:.-]+)[^}\n]*\}", md))
            for text in re.findall(r"^#{1,6}\s+(.+?)\s*#*\s*$", md, flags=re.M):
                own, text = re.search(r"\{[^}]*#", text), re.sub(r"\s*\{[^}]*\}\s*$", "", text)
                if own: continue
                base = heading_id(text); n = 0
                while (name := base + (f"-{n}" if n else "")) in out: n += 1
                out.add(name)
        return out

# ---- checking the site

def sidebar_targets(contents) -> list[str]:
    "Every page or link that a sidebar or navigation bar names"
    out = []
    for x in contents if isinstance(contents, list) else [contents]:
        if isinstance(x, str): out.append(x)
        elif isinstance(x, dict):
            out += [x[k] for k in ("href", "file") if isinstance(x.get(k), str)]
            out += sidebar_targets(x.get("contents") or []) + sidebar_targets(x.get("menu") or [])
    return [t for t in out if t not in ("auto", "---")]

def rendered(name:PurePosixPath, globs:list[str]) -> bool:
    "Whether quarto's render list names this page; `!` takes out what came before; a `*` stays within a folder"
    hit = not globs
    for g in globs:
        minus, pattern = g.startswith("!"), g.lstrip("!")
        # A leading / anchors at the project's folder, anything else matches at any depth.
        p, n = pattern.lstrip("/").split("/"), name.parts
        if "**" in p: match = fnmatch.fnmatch(str(name), pattern.lstrip("/").replace("**/", "*"))
        else:
            tail = n if pattern.startswith("/") else n[-len(p):]
            match = len(tail) == len(p) and all(fnmatch.fnmatch(a, b) for a, b in zip(tail, p))
        if match: hit = not minus
    return hit

NO_ADDRESS = "nbdev's `source` links lead nowhere as long as git_url in settings.ini is empty"

def link_problem(page:Page, url:str, pages:dict, by_html:dict, root:Path, proc:Path) -> str|None:
    "Why a link leads nowhere, or None"
    if re.match(r"[a-zA-Z][\w+.-]*:", url) or url.startswith("//"):
        if url.startswith("attachment:"): return None if url[11:] in page.attachments else f"no attachment {url[11:]}"
        return None   # another site: not asked, so that the check needs no network
    target, _, anchor = url.partition("#")
    target, anchor = unquote(target.partition("?")[0]), unquote(anchor)
    base = "" if target.startswith("/") else str(page.name.parent)
    place = os.path.normpath(os.path.join(base, target.lstrip("/"))) if target else str(page.name)
    if target.endswith("/") or place == ".": place = os.path.normpath(os.path.join(place, "index.html"))
    there = pages.get(place) or by_html.get(place)
    if there is None:
        # Not a page: a file beside the notebook, copied with it or of the repository.
        in_repo = (root/"nbs"/place).resolve()
        if (proc/place).is_file(): return None
        if in_repo.is_relative_to(root.resolve()) and in_repo.exists() and not target.startswith("/"): return None
        if target.startswith("/blob/"): return NO_ADDRESS
        return "no such page or file"
    return None if not anchor or anchor in there.anchors else f"{there.name} has no heading #{anchor}"

def check_site(root:Path, proc:Path) -> Report:
    "Check the processed notebooks in `proc` against `_quarto.yml` in `root`, and those they came from for errors"
    rep = Report()
    say = rep.problems.append
    cfg = yaml.safe_load((root/"_quarto.yml").read_text(encoding="utf-8"))
    site, globs = cfg.get("website", {}), cfg.get("project", {}).get("render", [])
    pages = {}
    for f in sorted(proc.rglob("*.ipynb")):
        p = Page(f, proc); pages[str(p.name)] = p
    by_html = {p.html: p for p in pages.values()}
    rep.pages = len(pages)
    if "index.ipynb" not in pages: say("index.ipynb: missing, the site has no front page")
    if len(by_html) < len(pages): say("two notebooks make the same page")

    sidebars = site.get("sidebar") or {}
    sidebars = sidebars if isinstance(sidebars, list) else [sidebars]
    named = [t for s in sidebars for t in sidebar_targets(s.get("contents") or [])]
    bar = site.get("navbar")
    bar = bar if isinstance(bar, dict) else {}
    extra = [t for side in ("left", "right") for t in sidebar_targets(bar.get(side) or [])]
    for t in named + extra:
        if not re.match(r"[a-z]+:", t) and t not in pages and not (proc/t).is_file(): say(f"_quarto.yml: no page {t}")
    for t in sorted({t for t in named if named.count(t) > 1}): say(f"_quarto.yml: {t} is in the sidebar twice")
    for name, p in pages.items():
        if not rendered(p.name, globs): say(f"{name}: no render glob of _quarto.yml covers it")
        elif name not in named: say(f"{name}: not in the sidebar")

    for name, p in pages.items():
        rep.images += p.images
        for e in p.errors: say(f"{name}: {e}")
        sourceless = []
        for image, url in p.links:
            rep.links += 1
            rep.images += bool(image)
            why = link_problem(p, url, pages, by_html, root, proc)
            if why == NO_ADDRESS: sourceless.append(url)
            elif why: say(f"{name}: link to {url}: {why}")
        if sourceless: say(f"{name}: {NO_ADDRESS} ({len(sourceless)} of them, {sourceless[0]} ...)")
        for ref in p.refs:   # on a website quarto resolves them within one page only
            if ref not in p.labels: say(f"{name}: cross-reference @{ref} has no label on its page")
        twice = {x for x in p.labels if p.labels.count(x) > 1}
        for label in sorted(twice): say(f"{name}: label {label} is given twice")
        for label, n in p.pictures_of.items():
            if label.startswith("fig-") and not n: say(f"{name}: the cell labelled {label} holds no image")
        drawn = name.startswith("figures/fig_") and name != "figures/fig_runs.ipynb"      # that one lists commands
        if drawn and not p.images: say(f"{name}: a figure notebook without an image")
    for f in sorted((root/"nbs").rglob("*.ipynb")):   # hidden cells do not reach the processed page
        name = f.relative_to(root/"nbs")
        if any(part[0] in "._" for part in name.parts): continue
        if str(name) not in pages: say(f"{name}: not processed"); continue
        for e in Page(f, root/"nbs").errors:
            if e not in pages[str(name)].errors: say(f"{name}: stored {e}")
    if (root/"README.md").exists():
        for image, url in links_of(without_code((root/"README.md").read_text(encoding="utf-8"))):
            rep.links += 1
            rep.images += bool(image)
            path = unquote(url.partition("#")[0])
            elsewhere = re.match(r"[a-zA-Z][\w+.-]*:", url)
            if path and not elsewhere and not (root/path).exists(): say(f"README.md: link to {url}: no such file")
    return rep

# ---- making the processed notebooks

def process(root:Path) -> tuple[Path, list[str]]:
    """Process the notebooks into `_proc` as nbdev does for quarto, and say which cannot be.
    Not by an nbdev command: those download quarto where it is missing."""
    from nbdev import serve, serve_drv
    with contextlib.chdir(root), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        # All of them, always: a page whose notebook is gone must not stay.
        try:
            proc = Path(serve.proc_nbs(n_workers=2, force=True))
            site_pages.prepare(root, proc)
            return proc, []
        except Exception as e: first = e   # ends at the first notebook that fails, so the rest is tried here one by one
        proc, bad = root/"_proc", []
        for src in serve.nbglob(as_path=True):
            dst = proc/src.absolute().relative_to((root/"nbs").absolute())
            if dst.exists(): continue
            dst.parent.mkdir(parents=True, exist_ok=True)
            try: serve_drv.main((src, dst, serve.FilterDefaults))
            except Exception as e:   # whatever a cell raises
                why, cell = e.__cause__ or e, re.search(r"in cell \d+ :\n(.*)", str(e))
                said = f"{dst.relative_to(proc)}: {type(why).__name__}: {str(why).splitlines()[0]}"
                if cell: said += (f" in the cell {cell.group(1)!r}: for the pages nbdev runs cells that import, export "
                                  "or show_doc and no others, so keep imports in a cell of their own")
                bad.append(said)
        return proc, bad or [f"the notebooks can be processed one by one but not together: {first}"]

def main(root:Path, build:bool) -> int:
    rep = Report()
    # For nbdev's workers: it quotes every cell that holds an import and more; two with all the cores each are slower.
    os.environ.update(PYTHONWARNINGS="ignore::UserWarning", OMP_NUM_THREADS="1")
    if build and shutil.which("quarto"):
        r = subprocess.run([sys.executable, "-c", "from nbdev.quarto import nbdev_docs; nbdev_docs()"], cwd=root)
        done = r.returncode == 0
        if done: print("docs: the site is _docs/index.html")
        proc, rep.problems = root/"_proc", [] if done else ["nbdev_docs failed"]
    else:
        if build: print("docs: quarto is not on PATH, so no pages are made; the processed notebooks are checked")
        proc, rep.problems = process(root)
    if not rep.problems: rep = check_site(root, proc)
    for p in rep.problems: print(p)
    print(rep)
    return 1 if rep.problems else 0

if __name__ == "__main__":
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--build", action="store_true", help="build the site first where quarto is on PATH")
    sys.exit(main(Path(__file__).resolve().parents[1], ap.parse_args().build))
