"Losses, gradients and initial weights of every mixer under every rule are those that were recorded"
import json
import pytest
import fingerprint

STORED = json.loads(fingerprint.STORED.read_text())
BITS = STORED["canary"] == fingerprint.canary()      # else another machine's arithmetic: to a part in a thousand

def changed(names):
    found = {n: fingerprint.differences(STORED["cases"][n], fingerprint.measure(n), BITS) for n in names}
    return {n: d for n, d in found.items() if d}

@pytest.mark.parametrize("mixer", fingerprint.MIXERS)
def test_every_rule_gives_what_it_gave(mixer): assert not changed(f"{mixer}, {rule}" for rule in fingerprint.RULES)

def test_training_gives_what_it_gave(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not changed(["train"])

def test_a_changed_number_is_noticed():
    name = "softmax, bp"
    got = fingerprint.measure(name)
    for spoil in (dict(losses=[*got["losses"][:-1], got["losses"][-1]*1.01]), dict(size=got["size"]*1.01)):
        assert fingerprint.differences(STORED["cases"][name], got | spoil, bits=False)
    if BITS: assert fingerprint.differences(STORED["cases"][name], got | dict(grads="0"), bits=True) == ["grads"]
    assert not fingerprint.differences(STORED["cases"][name], got, bits=False)
