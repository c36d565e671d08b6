"Verdicts follow from rows, and the pages that show them show these"
import re
import pytest
from conftest import NBS, ROOT, load
from okadfa.run.claims import claims_table, read_results, verdicts
from okadfa.run.headlines import ATTENTION, BYTES, CLAIMS, CREDIT, EARLIER, FRONT, front_table
from test_figures import between, printed

@pytest.fixture(scope="module")
def results(): return read_results(ROOT/"results")

def test_every_headline_is_there():
    said = " ".join(c.statement for c in EARLIER.values())
    for figure in ("0.95", "GradError", "below 0.1", "31.8%", "below 50", "10 times", "2,048", "Memory", "6.6",
                   "O(n log n)", "14.3%", "5.33", "18%", "phases", "tokenizer"): assert figure in said, figure
    assert {"rounds", "half", "depth", "carried", "features", "landmarks", "spectral", "ppmd", "zpaq", "polar",
            "regions"} <= CLAIMS.keys() and set(FRONT) <= CLAIMS.keys() and 10 <= len(FRONT) <= 14

@pytest.mark.parametrize("name", CLAIMS)
def test_files_and_pages_are_there(name):
    claim = CLAIMS[name]
    assert claim.files and all((ROOT/"results"/f"{f}.jsonl").exists() for f in claim.files)
    assert (NBS/claim.page).exists() and claim.sense in ("at least", "at most")

@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_with_rows_says_all(name, results):
    x = verdicts({name: CLAIMS[name]}, results)[name]
    assert x.found is not None and x.found.rows and x.found.control and x.found.scope and x.found.number.spread
    assert x.found.number.low <= x.found.number.value <= x.found.number.high
    assert re.search(r"\d", x.found.control)

def change(pick, **fields): return lambda r: r | fields if pick(r) else r

def is_run(name): return lambda r: r.get("run") == name
def is_name(name): return lambda r: r["name"] == name
def of_rule(rule): return lambda r: r["sweep"] == "rules" and r["rule"] == rule and r["data"] == "wikitext-2"
def arm(name): return lambda r: r.get("arm") == name
def is_dfa(microbatches): return lambda r: (r["variant"], r["microbatches"]) == ("dfa", microbatches)
def AT_2048(r): return (r["variant"], r["what"], r["n"]) == ("favor", "training", 2048)

@pytest.mark.parametrize("name,before,file,edit,after", [
    ("price", "refuted", "demo", change(is_run("okadfa"), bits_per_byte=2.0), "confirmed"),
    ("violation", "refuted", "demo", change(is_run("okadfa"), violation_mean=.05), "confirmed"),
    ("fall", "beaten", "wikitext", lambda r: r | dict(token_ppl=45_000), "refuted"),
    ("below_50", "open", "wikitext", lambda r: r | dict(token_ppl=49), "confirmed"),
    ("cosine", "refuted", "wikitext", lambda r: r | dict(attn_sim=.96), "confirmed"),
    ("grad_error", "refuted", "ablate", change(of_rule("identity"), error=.05), "confirmed"),
    ("rounds", "confirmed", "ablate", change(of_rule("identity+2"), nats=1.5), "refuted"),
    ("identity", "confirmed", "ablate", change(of_rule("identity"), nats=1.6), "refuted"),
    ("depth", "confirmed", "depth/ablate", change(lambda r: r["rule"] == "identity+2", nats=2.), "refuted"),
    ("deep_round", "confirmed", "depth/ablate", change(lambda r: "64 units" in r["title"], nats=2.), "refuted"),
    ("best", "confirmed", "demo", change(is_run("best"), bits_per_byte=3.), "refuted"),
    ("regions", "confirmed", "ablate", change(lambda r: r.get("rule") != "bp", loss=[[1, 9.], [2000, 9.]]), "refuted"),
    ("features", "refuted", "probe", change(arm("learnt & sinks & window"), perplexity=20.), "confirmed"),
    ("landmarks", "confirmed", "probe", change(arm("landmarks & sinks & window"), perplexity=99.), "refuted"),
    ("ppmd", "confirmed", "compression", change(is_name("model"), given_train=1.6), "refuted"),
    ("ppmd", "confirmed", "compression", change(is_name("ppmd"), name="gone"), "open"),
    ("zpaq", "refuted", "compression", change(is_name("zpaq"), given_train=1.6), "confirmed"),
    ("step", "confirmed", "pipeline", change(is_dfa(1), ratio=dict(median=2., q1=1.9, q3=2.1)), "refuted"),
    ("step_4", "open", "pipeline", change(is_dfa(4), ratio=dict(median=.9, q1=.8, q3=.95)), "confirmed"),
    ("ten_times", "refuted", "attention", change(AT_2048, ratio=dict(median=.1, q1=.09, q3=.1)), "confirmed"),
    ("ten_times", "refuted", "attention", change(AT_2048, ratio=dict(median=.05, q1=.05, q3=.06)), "beaten"),
    ("compression", "beaten", "quantize", lambda r: r | dict(errors=dict(worst=.2)), "refuted")])
def test_a_tampered_row_changes_the_verdict(name, before, file, edit, after, results):
    claim = {name: CLAIMS[name]}
    assert verdicts(claim, results)[name].verdict == before
    assert verdicts(claim, results | {file: [edit(r) for r in results[file]]})[name].verdict == after

def test_without_rows_a_claim_is_open():
    nothing = {name: [] for name in read_results(ROOT/"results")}
    assert {x.verdict for x in verdicts(CLAIMS, nothing).values()} == {"open"}

def stored(path):
    outputs = (o for c in load(path)["cells"] for o in c.get("outputs", []))
    return "".join("".join(o.get("text", "")) for o in outputs)

def test_pages_show_the_verdicts_of_the_rows(results):
    assert between("claims") == front_table(results, "nbs/").strip()
    assert front_table(results, "").strip() in stored(NBS/"index.ipynb")
    judged = verdicts(CLAIMS, results)
    for part in (EARLIER, CREDIT, ATTENTION, BYTES):
        assert claims_table((judged[name] for name in part), "../") in printed("fig_claims.ipynb")
