"The demonstration deletes a folder only where everything in it is a demonstration's, and nothing before it is whole"
import json
import pytest
from okadfa.core import InputError
from okadfa.run import demo as D

ROW = dict(model=dict(credit="dfa", seed=0), steps=1, bits_per_byte=2.5, grad_cosine=.9, attn_sim=.8, violation_mean=7.,
           tokens_per_s=4000., peak_mib=512., loss=[(1, 2.)], alignment=dict(block0=[(1, .9)]))

@pytest.fixture
def quick(monkeypatch):
    "Runs that write what runs write, without training"
    def train(folder, args):
        (folder/"checkpoint").mkdir(parents=True)
        for name in ("run.json", "checkpoint/config.json"): (folder/name).write_text("{}")
        return ROW, "a text"
    monkeypatch.setattr(D, "_train_and_sample", train)

@pytest.fixture
def no_training(monkeypatch):
    "A demonstration that comes as far as its first run fails"
    monkeypatch.setattr(D.subprocess, "run", lambda *a, **k: pytest.fail("it began to train"))

def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

def write(folder, *names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True); (folder/name).write_text("years of work")

def refused(tmp_path, out, says):
    before = files(tmp_path)
    with pytest.raises(InputError) as e: D.demo(out, 1)
    assert "\n" not in str(e.value) and says in str(e.value) and files(tmp_path) == before

@pytest.mark.parametrize("names", [("table.md",), ("table.md", "demo.png"), ("table.md", "samples.txt", "thesis.tex"),
                                   ("table.md", "okadfa/run.json", "baseline/run.json"), ("demo.json", "table.md")])
def test_a_table_does_not_make_a_demonstration(tmp_path, no_training, names):
    write(tmp_path/"out", *names)
    refused(tmp_path, tmp_path/"out", "not a demonstration's folder")

@pytest.mark.parametrize("names", [("thesis.tex",), ("okadfa/run.json",), ("table.md",)])
def test_what_stands_in_the_way_of_the_part_is_kept(tmp_path, no_training, names):
    write(tmp_path/"out.part", *names)
    refused(tmp_path, tmp_path/"out", "out.part")

@pytest.mark.parametrize("content", ["[]", "{", '{"what": "another demo", "files": ["a"]}', '"okadfa demo"', "\xff"])
def test_somebody_elses_demo_json(tmp_path, no_training, content):
    write(tmp_path/"out", "a", "table.md")
    (tmp_path/"out"/"demo.json").write_text(content)
    refused(tmp_path, tmp_path/"out", "not a demonstration's folder")

def test_files_and_links_are_no_folders(tmp_path, no_training):
    write(tmp_path, "file", "real/thesis.tex")
    refused(tmp_path, tmp_path/"file", "not a folder")
    (tmp_path/"link").symlink_to(tmp_path/"real")
    refused(tmp_path, tmp_path/"link", "not a folder")
    refused(tmp_path, "", "out is empty"); refused(tmp_path, ".", "no name of its own")
    with pytest.raises(InputError, match="results is empty"): D.demo(tmp_path/"new", 1, results="")

def test_one_demonstration_replaces_another(tmp_path, quick):
    out = tmp_path/"out"
    out.mkdir()                                               # an empty folder is nobody's
    for _ in range(2): D.demo(out, 1)
    made = files(out)
    assert json.loads(made["demo.json"])["files"] == sorted(made) and not (tmp_path/"out.part").exists()
    write(out, "okadfa/checkpoint/notes.txt")                 # inside a run's folder, too
    refused(tmp_path, out, "holds okadfa/checkpoint/notes.txt")

def test_an_older_demonstration_is_replaced(tmp_path, quick):
    out = tmp_path/"out"
    older = "table.md", "demo.png", "samples.txt", "okadfa/run.json", "okadfa/tb/events.1", "baseline/run.json"
    write(out, *older, "thesis.tex")
    refused(tmp_path, out, "holds thesis.tex")
    (out/"thesis.tex").unlink()
    D.demo(out, 1)
    assert "okadfa/tb/events.1" not in files(out) and "demo.json" in files(out)

def test_a_broken_demonstration_is_begun_again(tmp_path, quick, monkeypatch):
    good = D._train_and_sample
    def dies(folder, args):
        if folder.name == "baseline": write(folder, "run.json", "half"); raise SystemExit(1)
        return good(folder, args)
    with monkeypatch.context() as m:
        m.setattr(D, "_train_and_sample", dies)
        with pytest.raises(SystemExit): D.demo(tmp_path/"out", 1)
    assert (tmp_path/"out.part"/"baseline"/"half").exists() and not (tmp_path/"out").exists()
    D.demo(tmp_path/"out", 1)
    assert not (tmp_path/"out.part").exists() and "baseline/half" not in files(tmp_path/"out")

def test_a_folder_filled_while_it_trained_is_kept(tmp_path, quick, monkeypatch):
    out, good = tmp_path/"out", D._train_and_sample
    monkeypatch.setattr(D, "_train_and_sample", lambda *a: (write(out, "thesis.tex"), good(*a))[1])
    with pytest.raises(InputError, match="not a demonstration's"): D.demo(out, 1)
    assert list(files(out)) == ["thesis.tex"] and (tmp_path/"out.part"/"table.md").exists()
