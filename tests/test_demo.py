"The demonstration deletes a folder only where everything in it is a demonstration's, and nothing before it is whole"
import dataclasses, json
import pytest
from okadfa.core import InputError
from okadfa.run import demo as D
from okadfa.run.panel import length_rows

BITS = dict(okadfa=2.5, best=2.21, baseline=2.2)

def row(name, seed=0, more=0., **kw):
    "As `demo_row` gives it"
    return dict(model=dict(credit="dfa", seed=seed, n_layers=4, d_model=128, max_len=256), steps=1,
                train=dict(batch_size=8, precision="fp32", seed=seed), train_sha256="f",
                bits_per_byte=BITS[name] + more, grad_cosine=.9, attn_sim=.8, violation_mean=7.,
                tokens_per_s=4000., peak_mib=512., loss=[(1, 2.)],
                alignment=dict(block0=[(1, .9)], block1=[(1, 1.)])) | kw

def timed(n, others=0., **kw):
    "A row about long texts: the best form is linear, the baseline is not"
    step, token = (dict(okadfa=[.003*n]*3, best=[x*n]*3, baseline=[y*n*n]*3) for x, y in ((.002, 1e-5), (1e-5, 1e-7)))
    return dict(kind="panel", n=n, step=step, token=token, others=others, precision="fp32", threads=2, models=1,
                device="cpu") | kw

@pytest.fixture
def quick(monkeypatch):
    "Runs that write what runs write, without training"
    def train(folder, args):
        (folder/"checkpoint").mkdir(parents=True)
        for name in ("run.json", "checkpoint/config.json"): (folder/name).write_text("{}")
        return row(folder.name), "a text"
    monkeypatch.setattr(D, "_train_and_sample", train)
    monkeypatch.setattr(D, "length_rows", lambda models, settings: map(timed, sorted(settings.n)))

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

def test_three_models_of_one_size_and_what_they_cost_and_buy(tmp_path, quick, capsys):
    rows = D.demo(tmp_path/"out", 1, precision="fp32", lengths=(256, 64), results=tmp_path/"results")
    assert list(rows) == list(D.RUNS) == ["okadfa", "best", "baseline"]
    said = " ".join(capsys.readouterr().out.split())
    assert "best form +0.010, OKADFA" in said and "from 256 bytes on, 1.28x as fast at 256" in said
    assert said.index("computing in fp32") < said.index("best form") < said.index("Longer texts") < said.index("Beside")
    text = (tmp_path/"out"/"table.md").read_text()
    assert "| 2.210 | +0.010 |" in text and "| 1.28x | 2.56x |" in text
    kept = D.read_rows(tmp_path/"results"/"demo.jsonl")
    assert [r["kind"] for r in kept] == ["demo"]*3 + ["panel"]*2 and [r["n"] for r in kept[3:]] == [64, 256]

def test_rows_about_long_texts_are_what_tables_and_pictures_take(seeded):
    small = {name: dataclasses.replace(c, n_layers=2, d_model=16, n_heads=2) for name, c in D.configs().items()}
    rows = list(length_rows(small, D.LengthSettings((20, 9), rounds=2, precision="fp32")))
    assert [r["n"] for r in rows] == [9, 20] and all(r.keys() == timed(8).keys() for r in rows)
    runs = D.by_seed(rows_of((0, 1)))
    assert all(t in D.panel_table(D.panel_rows(rows)) for t in ("9 bytes", "20 bytes", "generated byte (ms), OKADFA"))
    assert "speed, training step at 20" in D.summary_table(runs, rows) and "at 20" in D.verdict(runs, rows)
    fig = D.plot(runs, rows)
    assert [len(ax.lines) for ax in fig.axes] == [3]*4 and "2 threads" not in D.selection(runs, rows)

def test_the_models_differ_in_nothing_but_what_is_compared():
    made = D.configs(seed=3)
    values = [{f: getattr(c, f) for f in ("d_model", "n_layers", "n_heads", "max_len", "expand", "seed")}
              for c in made.values()]
    assert values[0] == values[1] == values[2] and values[0]["seed"] == 3
    for name, words in D.commands(D.Path("runs"), 7, 3, "fp32").items():
        assert all(f"--{flag}" in words for flag in ("lr", "batch-size", "d-model", "n-layers", "warmup"))
        assert ("--half-round" in words) == (name == "best") == made[name].half_round
        assert words[words.index("--mixer") + 1] == made[name].mixer

@pytest.mark.parametrize("given,says", [(dict(precision="fp16"), "precision must be"),
                                        (dict(lengths=(64, 0)), "lengths must be at least 1"),
                                        (dict(steps=0), "steps must be")])
def test_bad_choices_are_refused_before_anything_is_written(tmp_path, no_training, given, says):
    with pytest.raises(InputError, match=says): D.demo(tmp_path/"out", **given)
    assert not list(tmp_path.iterdir())

def rows_of(seeds, more=0., **kw):
    return [dict(kind="demo", run=name) | row(name, s, more, **kw) for s in seeds for name in D.RUNS]

def test_rows_of_another_size_text_or_length_are_left_out():
    old = rows_of((0, 1, 2), more=1., train_sha256="another") + rows_of((3,), more=1., steps=9)
    two = [r for r in rows_of((7,), more=1.) if r["run"] != "best"]           # not all models have this seed
    runs = D.by_seed(old + two + rows_of((0,), more=1.) + rows_of((0, 1)))    # the newest row of a seed counts
    assert {name: list(x) for name, x in runs.items()} == dict.fromkeys(D.RUNS, [0, 1])
    assert all(r["bits_per_byte"] == BITS[name] for name, x in runs.items() for r in x.values())
    assert D.by_seed([r for r in old if r["run"] != "best"])["baseline"] == {}
    assert "(0, 1)" in D.selection(runs, []) and "1 step of 2,048 bytes" in D.selection(runs, [])

def test_quiet_times_are_preferred_and_others_are_named():
    runs, noisy, quiet = D.by_seed(rows_of((0, 1))), timed(256, .8), [timed(64, .02), timed(256, .02)]
    assert D.panel_rows([*quiet, noisy]) == quiet
    assert D.panel_rows([noisy, timed(256, .9), dict(kind="demo"), quiet[0]]) == [noisy, quiet[0]]
    assert "at most 2%" in D.selection(runs, quiet) and "no clean times" not in D.selection(runs, quiet)
    assert "no clean times" in D.selection(runs, [noisy])
    other = timed(64, threads=1)
    assert D.panel_rows([other, *quiet]) == quiet

def test_the_verdict_is_a_loss_where_it_is_one():
    runs = D.by_seed(rows_of((0, 1)))
    assert "ahead of the baseline nowhere, 0.32x as fast at 64" in D.verdict(runs, [timed(64)])
    assert "at every length" in D.verdict(runs, [timed(256)])
    runs["best"][1]["bits_per_byte"] += .2
    assert "best form +0.110 (+0.010 to +0.210), OKADFA" in D.verdict(runs, [])

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
