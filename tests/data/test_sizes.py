import pytest
from conftest import fails, ok

from common import UserError
from data import sizes
from model import ModelConfig
from training import own_text


def chosen(train, val, documents, words, **given):
    return {name: value for name, value, _ in sizes.of_corpus(train, val, documents, words, given)}


def test_sizes_follow_the_amount_of_text():
    assert [sizes.of_files(size, {})[0][1] for size in (0, 400_000, 3_000_000, 10**11, None)] == [320, 512, 4096, 8192, 8192]
    given = {"vocab_size": "999", "val_fraction": "0.3"}
    assert [(name, value) for name, value, _ in sizes.of_files(10**6, given)] == list(given.items())
    assert [name for name, *_ in sizes.of_files(10**6, {"tokenizer": "char"})] == ["val_fraction"]
    few = chosen(114, 15, 9, 18)
    assert (few["features"], few["n_embd"], few["n_head"], few["block_size"], few["max_steps"]) == (8, 64, 8, 8, 100)
    records = chosen(850_000, 43_000, 9_500, 13_000)
    assert (records["features"], records["n_embd"], records["block_size"], records["max_steps"]) == (128, 128, 128, 1000)
    assert (records["local_heads"], records["recall_heads"]) == (3, 4)
    heads = lambda **given: {name: chosen(850_000, 43_000, 9_500, 13_000, **given)[name] for name in ("local_heads", "recall_heads")}
    of_given = [(n_head, n_kv_head) for n_head in (1, 2, 6, 8, 9) for n_kv_head in range(1, n_head + 1) if n_head % n_kv_head == 0]
    for n_head, n_kv_head in of_given:  # those that the model takes
        given = dict(n_embd=32 * n_head, n_head=n_head, n_kv_head=n_kv_head)
        ModelConfig(**given, **heads(**given))
        own_text.checked_settings(given)
    assert [tuple(heads(n_kv_head=n).values()) for n in (4, 2, 1)] == [(2, 4), (0, 4), (0, 0)]
    assert [heads(local_heads=n)["recall_heads"] for n in (0, 6, 7)] == [4, 2, 1]
    *_, why = [value for name, value, _ in sizes.of_corpus(850_000, 43_000, 9_500, 13_000, {}, characters=True) if name == "recall_heads"]
    assert why == 0
    books = chosen(850_000, 43_000, 40, 13_000)
    assert (books["graph"], books["features"], books["n_embd"]) == ("domain", 16, 128)  # those of a head, for every head
    for documents, words in ((1, 0), (9_500, 0), (9_500, 16), (16, 13_000)):
        assert (chosen(850_000, 43_000, documents, words)["graph"]) == "chain"
    *_, seen = [why for name, _, why in sizes.of_corpus(30_000_000, 1_000_000, 200_000, 50_000, {}) if name == "max_steps"]
    assert "6.8% of the text is seen; --max_steps=14649 sees all of it once" in seen
    longer = chosen(850_000, 43_000, 9_500, 13_000, max_steps=5000, n_embd=256, block_size=64)
    assert (longer["features"], longer["lr_decay_steps"], longer["warmup_steps"], longer["block_size"]) == (256, 5000, 500, 64)
    assert chosen(850_000, 43_000, 9_500, 13_000, max_steps=0, n_head=0, batch_size=0)["lr_decay_steps"] == 1  # train.py refuses these
    with pytest.raises(UserError, match="12 tokens to train on and 15 for validation are too few"):
        sizes.of_corpus(12, 15, 2, 3, {})


def test_nanogpts_data_has_its_sizes_already(tmp_path):
    (tmp_path / "train.bin").touch()
    assert ok("data/sizes.py", tmp_path, cwd=tmp_path) == ""
    assert "stay as they are" in fails("data/sizes.py", tmp_path, "--vocab_size=300", cwd=tmp_path)
    (tmp_path / "train.bin").rename(tmp_path / "a.txt")
    lines = ok("data/sizes.py", tmp_path / "a.txt", "--vocab_size=300", cwd=tmp_path).splitlines()
    assert lines[0] == "vocab_size=300         # tokens at most; --vocab_size=N gives another" and len(lines) == 2


def test_common_words_are_those_of_two_texts():
    assert sizes.common_words(["a cat sat", "the cat sat", "the dog"]) == 3
    assert sizes.common_words(["one", "two"]) == sizes.common_words(["", ""]) == 0
