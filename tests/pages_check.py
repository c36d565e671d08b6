"""Look at the built pages as a browser shows them: `python tests/pages_check.py [SITE] [--pages GLOB] [--shots FOLDER]`

Every page of SITE (default `_docs`) is opened in headless Chromium, at a desktop's and a phone's width, light and dark.
What a reader would trip over is one line each, exit code 1: paragraphs of one letter, tables and links shown as raw
text, requests that leave the page, links and anchors that lead nowhere, pictures without words, pages wider than the
screen, text without contrast, errors in the console. Where there is no browser it says so, with exit code 0."""
import argparse, json, mimetypes, re, shutil, sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import unquote, urlsplit
from docs_check import Report

HOST = "http://okadfa.invalid"          # answered from the folder; nothing is ever asked of a network
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
BROWSERS = "chromium", "chromium-browser", "google-chrome", "google-chrome-stable"

def why_not() -> str|None:
    "Why no page can be looked at here, or None"
    try: import playwright                                                               # noqa: F401
    except ImportError: return "playwright is not installed: pip install -e '.[pages]'"
    return None if browser_path() else f"no browser: none of {', '.join(BROWSERS)} is on PATH"

def browser_path() -> str|None: return next(filter(None, map(shutil.which, BROWSERS)), None)

# ---- opening pages

ASK = Path(__file__).with_name("pages_look.js").read_text(encoding="utf-8")

class Site:
    "A folder of pages, answered to a browser without a server; what the pages ask of others is written down"
    def __init__(self, root:Path): self.root, self.asked = root.resolve(), []

    def file(self, url:str) -> Path:
        path = (self.root/unquote(urlsplit(url).path).lstrip("/")).resolve()
        return path/"index.html" if path.is_dir() else path

    def answer(self, route) -> None:
        url = route.request.url
        if not url.startswith(HOST + "/"):
            self.asked.append(f"asks {urlsplit(url).netloc or url[:40]} for {url[:100]}")
            return route.abort()
        path = self.file(url)
        if path.is_relative_to(self.root) and path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
            route.fulfill(body=path.read_bytes(), content_type=kind)
        else:
            if not url.endswith("/favicon.ico"): self.asked.append(f"no file {urlsplit(url).path}")
            route.fulfill(status=404, body="")

@contextmanager
def browser():
    "A headless Chromium"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=browser_path(), args=["--no-sandbox"])
        try: yield b
        finally: b.close()

# The switch makes the browser load style sheets anew; until then the page is half in either colour.
STYLED = """() => [...document.querySelectorAll('link[rel="stylesheet"]')].every(l => l.sheet)
    && new Promise(r => requestAnimationFrame(() => requestAnimationFrame(() => r(true))))"""

def in_colour(page, dark:bool) -> None:
    "Turn the page's own switch, if it is not there already, and wait until it is"
    if page.evaluate("document.body.classList.contains('quarto-dark')") != dark:
        page.evaluate("window.quartoToggleColorScheme()")
    page.wait_for_function(STYLED)

def look(context, site:Site, name:str, shots:Path|None) -> dict:
    "What is on one page, and what is wrong with it by itself"
    page, said = context.new_page(), []
    page.set_default_timeout(120_000)
    page.on("console", lambda m: said.append(f"console: {m.text[:120]}") if m.type == "error" else None)
    page.on("pageerror", lambda e: said.append(f"script error: {str(e)[:120]}"))
    site.asked.clear()
    try:
        page.goto(f"{HOST}/{name}", wait_until="load")
        page.wait_for_timeout(50)
        found = page.evaluate(f"{ASK}.all()")
        if not found["themes"]: said.append("no dark theme")
        for size, (width, height) in SIZES.items():
            page.set_viewport_size(dict(width=width, height=height))
            for dark in (False, True)[:1 + found["themes"]]:
                if found["themes"]: in_colour(page, dark)
                colour = "dark" if dark else "light"
                said += [f"{size}: {s}" for s in page.evaluate(f"{ASK}.wide()")]
                said += [f"{colour}: {s}" for s in page.evaluate(f"{ASK}.contrast()")]
                if not shots: continue
                page.set_viewport_size(dict(width=width, height=3*height))        # the first screens
                page.screenshot(path=shots/f"{name[:-5].replace('/', '-')}-{size}-{colour}.png")
                page.set_viewport_size(dict(width=width, height=height))
    finally: page.close()
    # The console repeats what the requests have said.
    said = [s for s in said if "Failed to load resource" not in s]
    found["bad"] += dict.fromkeys(said + site.asked)
    return found

def link_problem(site:Site, names:dict[str, set], there:str, raw:str) -> str|None:
    "Why a link, as the browser resolves it, leads nowhere, or None"
    if not there.startswith(HOST + "/"): return None               # another site: not asked
    parts = urlsplit(there)
    path = site.file(there)
    if not path.is_relative_to(site.root) or not path.is_file(): return f"link to {raw}: no such page or file"
    name, anchor = path.relative_to(site.root).as_posix(), unquote(parts.fragment)
    if anchor and name in names and anchor not in names[name]: return f"link to {raw}: {name} has no #{anchor}"
    return None

def search_problems(site:Site) -> list[str]:
    "Raw markdown links in what the search shows"
    index = site.root/"search.json"
    if not index.exists(): return ["search.json: missing, so nothing can be searched"]
    raw = re.compile(r"\]\((?:/|https?:)[^)\s]*\)")
    entries = json.loads(index.read_text(encoding="utf-8"))
    return [f"search.json: a link as raw text in {e['href']}" for e in entries if raw.search(e["title"] + e["text"])]

def check_pages(root:Path, glob:str="**/*.html", shots:Path|None=None, say=lambda s: None, chromium=None) -> Report:
    "Look at every page of a site, in a browser of its own or in the one given"
    site, rep = Site(root), Report("pages")
    files = [f for f in sorted(root.glob(glob)) if "site_libs" not in f.parts]
    if shots: shots.mkdir(parents=True, exist_ok=True)
    looked = {}
    with nullcontext(chromium) if chromium else browser() as b:
        context = b.new_context(color_scheme="light", reduced_motion="reduce")
        context.route("**/*", site.answer)
        for f in files:
            name = f.relative_to(root).as_posix()
            looked[name] = look(context, site, name, shots)
            say(name)
        context.close()
    ids = {name: set(page["ids"]) for name, page in looked.items()}
    for name, page in looked.items():
        dead = dict.fromkeys(link_problem(site, ids, there, raw) for raw, there in page["links"])
        rep.problems += [f"{name}: {s}" for s in [*dict.fromkeys(page["bad"]), *filter(None, dead)]]
        rep.pages += 1; rep.links += len(page["links"]); rep.images += page["images"]
    rep.problems += search_problems(site)
    return rep

def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("site", nargs="?", type=Path, default=Path(__file__).resolve().parents[1]/"_docs")
    ap.add_argument("--pages", default="**/*.html", metavar="GLOB", help="which pages (default: all)")
    ap.add_argument("--shots", type=Path, metavar="FOLDER", help="write a picture of each page at each size and colour")
    ap.add_argument("--need", action="store_true", help="exit code 1 where nothing can be looked at")
    args = ap.parse_args()
    why = why_not() or (None if (args.site/"index.html").exists() else f"no site in {args.site.name}: quarto makes it")
    if why: print(f"pages: not looked at, {why}"); return int(args.need)
    rep = check_pages(args.site, args.pages, args.shots, lambda name: print(name, file=sys.stderr, flush=True))
    for p in rep.problems: print(p)
    print(rep)
    return 1 if rep.problems else 0

if __name__ == "__main__": sys.exit(main())
