"Figures that run their experiment: every notebook has the cell, every command can be given, one runs for real"
import json, shlex, subprocess, sys
from pathlib import Path
import click, pytest
from conftest import ROOT, clean_env, load, source
from okadfa.core import InputError, read_rows
from okadfa.run import rerun as module
from okadfa.run.ablate import choose_rules
from okadfa.run.cli import cli
from okadfa.run.rerun import QUICK_NOTE, Job, experiments, rerun

FREE = "fig_claims", "fig_runs"        # run nothing
FIGURES = sorted(p.stem for p in (ROOT/"nbs"/"figures").glob("fig_*.ipynb") if p.stem not in FREE)

@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_asks_for_its_rows_in_its_first_cell(name):
    code = [source(c) for c in load(Path("figures")/f"{name}.ipynb")["cells"] if c["cell_type"] == "code"]
    for line in ('RERUN = os.environ.get("RERUN") == "1"', 'SIZE = os.environ.get("SIZE", "full")',
                 'DEVICE = os.environ.get("DEVICE", default_device().type)',
                 f'here = rerun("{name}", SIZE, DEVICE, run=RERUN)'):
        assert line in code[0], line
    assert not any('"../../results' in s or '"../../README' in s for s in code), "rows that are not those of the cell"

def test_the_table_has_every_figure(): assert experiments().keys() - set(FREE) == set(FIGURES)

def all_jobs(): return [(name, job) for name, x in experiments().items() for job in (*x.full, *x.quick)]

@pytest.mark.parametrize("name,job", all_jobs(), ids=lambda x: x if isinstance(x, str) else x.args[:30])
def test_a_command_can_be_given(name, job, tmp_path):
    "Its options, rules and placeholders exist"
    known = dict.fromkeys(("results", "runs", "data", "tokenizer", *module.MAKERS), str(tmp_path)) | dict(device="cpu")
    words = [w.format(**known) for w in shlex.split(job.args)]
    command, words = cli.commands[words[0]], words[1:]
    if isinstance(command, click.Group): command, words = command.get_command(None, words[0]), words[1:]
    params = command.make_context(job.args.split()[0], list(words)).params
    if "sweeps" in params: assert choose_rules(params["sweeps"], params["only"])

@pytest.mark.parametrize("args,says", [
    (("fig_rules", "small"), "SIZE is quick or full, got 'small'"), (("fig_none",), "no figure 'fig_none'"),
    (("fig_rules", "quick", "tpu"), "DEVICE is cpu or cuda"),
    (("fig_rules", "quick", "cpu", False), "RERUN=1 makes them")])
def test_what_cannot_be_is_refused(args, says, tmp_path):
    with pytest.raises(InputError) as e: rerun(*args, root=tmp_path, say=lambda line: None)
    assert says in str(e.value) and "\n" not in str(e.value)

def test_only_rows_of_the_repository_reach_the_front_page(tmp_path, monkeypatch):
    text = "<!-- rules: x -->\nold\n<!-- /rules -->\n"
    (tmp_path/"README.md").write_text(text)
    for folder in ("results/quick", "mine"): (tmp_path/folder).mkdir(parents=True)
    def place(size): return rerun("fig_rules", size, "cpu", run=False, root=tmp_path, say=lambda line: None)
    place("quick").fill("rules", "new")
    monkeypatch.setenv("RESULTS", "mine")
    assert place("full").folder == tmp_path/"mine"
    place("full").fill("rules", "new")
    assert (tmp_path/"README.md").read_text() == text
    monkeypatch.delenv("RESULTS")
    place("full").fill("rules", "new")
    assert "new" in (tmp_path/"README.md").read_text()

def test_commands_run_once_and_go_on_after_an_interruption(tmp_path, monkeypatch):
    given = []
    def run(command, **kw): given.append(command[3:]); return subprocess.CompletedProcess(command, 0, "", "")
    train = Job("train --out {runs}/a --results {results}/a.jsonl")
    sweep, only_cuda = Job("ablate rules --results {results}"), Job("benchmark head --out {results}", "cuda")
    monkeypatch.setattr(module.subprocess, "run", run)
    monkeypatch.setattr(module, "experiments", lambda: dict(f=module.Experiment((train, sweep, only_cuda), (train,))))
    out = tmp_path/"runs"/"figures"/"full"/"a"
    def again(): given.clear(); rerun("f", "full", "cpu", root=tmp_path, say=lambda line: None); return given
    (out/"checkpoint").mkdir(parents=True)                          # begun: it goes on
    assert [words[-1] for words in again()] == ["--resume", str(tmp_path/"results")]
    assert [words[0] for words in again()] == ["ablate"]            # ended; a sweep looks at its rows itself
    (out/"checkpoint").rmdir(); out.rmdir()
    assert [words[0] for words in again()] == ["train", "ablate"]   # its folder is gone
    out.mkdir(parents=True); (tmp_path/"results"/".finished").rename(tmp_path/"away")
    assert "--resume" not in again()[0] and not out.exists()        # nothing to go on with: from the start

def test_a_command_that_fails_is_one_line(tmp_path, monkeypatch):
    broken = module.Experiment((), (Job("train --out {runs}/a --steps -1"),))
    monkeypatch.setattr(module, "experiments", lambda: dict(f=broken))
    with pytest.raises(InputError, match="okadfa train .*steps") as e: rerun("f", "quick", "cpu", root=tmp_path)
    assert "\n" not in str(e.value) and not (tmp_path/"results"/"quick"/".finished").exists()

def test_a_notebook_runs_its_experiment(repo_copy):
    "In a copy: quick rows are made and drawn, and nothing that is committed has changed"
    kept = {p: p.read_bytes() for p in (repo_copy/"README.md", *(repo_copy/"results").glob("*.jsonl"),
                                        *(repo_copy/"nbs"/"figures").glob("*.ipynb"))}
    env = clean_env(repo_copy) | dict(RERUN="1", SIZE="quick", DEVICE="cpu")
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output-dir",
               str(repo_copy/"runs"/"figures"), "fig_wikitext.ipynb"]
    r = subprocess.run(command, cwd=repo_copy/"nbs"/"figures", env=env, capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    rows = read_rows(repo_copy/"results"/"quick"/"wikitext.jsonl")
    assert [r["model"]["credit"] for r in rows] == ["dfa", "bp"] and {r["steps"] for r in rows} == {10}
    shown = (repo_copy/"runs"/"figures"/"fig_wikitext.ipynb").read_text()
    pictures = [o for c in json.loads(shown)["cells"] for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert QUICK_NOTE in shown and "Quick rows are not judged" in shown and len(pictures) == 1
    assert all(p.read_bytes() == before for p, before in kept.items())
