import shutil

import pytest
import torch

import checkpoint
from conftest import fails, ok
from data import tokenizer as tokenizers
from sample import generate, probabilities, sample


@pytest.fixture(scope="module")
def trained(work):
    path = work / "out" / "small" / "best.safetensors"
    tensors, header = checkpoint.read(path)
    return checkpoint.build_model(tensors, header, path).eval(), tokenizers.from_json(header["tokenizer"])


def test_probabilities_by_hand():
    p = torch.tensor([[0.1, 0.4, 0.2, 0.3]], dtype=torch.float64)
    logits = p.log() + 5
    close = torch.testing.assert_close
    close(probabilities(logits, 1.0, 0, 1.0), p)
    close(probabilities(logits, 0.5, 0, 1.0), p**2 / (p**2).sum())
    close(probabilities(logits, 1.0, 2, 1.0), torch.tensor([[0, 4 / 7, 0, 3 / 7]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 9, 0.65), torch.tensor([[0, 4 / 7, 0, 3 / 7]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 0, 0.75), torch.tensor([[0, 4 / 9, 2 / 9, 3 / 9]], dtype=torch.float64))
    close(probabilities(logits, 0, 3, 0.9), torch.tensor([[0, 1.0, 0, 0]], dtype=torch.float64))
    close(probabilities(logits, 1.0, 0, 1e-9), torch.tensor([[0, 1.0, 0, 0]], dtype=torch.float64))


def test_draws_follow_the_probabilities():
    p = torch.tensor([[0.1, 0.0, 0.6, 0.3]], dtype=torch.float64)
    generators = [torch.Generator().manual_seed(0)]
    counts = torch.bincount(torch.cat([sample(p, generators)[0] for _ in range(20_000)]), minlength=4)
    assert counts[1] == 0
    expected = 20_000 * p[0, [0, 2, 3]]
    assert ((counts[[0, 2, 3]] - expected)**2 / expected).sum() < 13.8  # chi-square, 2 degrees of freedom, p = 0.001


def test_cached_generation_equals_uncached(trained):
    """Past the context too, where it starts again from the last half."""
    model, _ = trained
    prompt, T = torch.tensor([[5, 6, 7], [9, 9, 9]]), model.config.block_size
    tokens = torch.stack(list(generate(model, prompt, 2 * T, 0, 0, 1.0, 0)), 1)
    context = prompt
    for produced in tokens.T:
        with torch.no_grad():
            assert (model(context)[:, -1].argmax(-1) == produced).all()
        context = torch.cat([context, produced[:, None]], 1)
        if context.size(1) > T:
            context = context[:, -(T // 2):]


def test_a_sample_does_not_depend_on_its_batch(trained):
    model, _ = trained
    alone = torch.stack(list(generate(model, torch.tensor([[5, 6]]), 40, 1.0, 50, 0.9, 7)), 1)
    many = torch.stack(list(generate(model, torch.tensor([[5, 6]] * 4), 40, 1.0, 50, 0.9, 7)), 1)
    assert torch.equal(many[:1], alone) and not torch.equal(many[1], many[0])


def test_text_and_nothing_else(work, trained, tmp_path):
    model, tokenizer = trained
    rows = torch.stack(list(generate(model, torch.tensor([tokenizer.encode("def ")] * 2), 30, 0.8, 200, 1.0, 3)), 1).tolist()
    expected = "\n".join(tokenizer.decode_bytes(row).decode("utf-8", "replace") for row in rows)
    (tmp_path / "prompt.txt").write_text("def ")
    shutil.copytree(work / "out" / "small", tmp_path / "moved")
    command = ["sample.py", "moved", "--max_new_tokens=30", "--num_samples=2", "--seed=3"]
    assert ok(*command, "--prompt=def ", cwd=tmp_path) == expected
    assert ok(*command, "--prompt_file=prompt.txt", cwd=tmp_path) == expected
    assert ok(*command, "--prompt_file=-", stdin="def ", cwd=tmp_path) == expected


def test_edges(work):
    assert ok("sample.py", "out/small", "--max_new_tokens=0", cwd=work) == ""
    assert ok("sample.py", "out/small", "--max_new_tokens=5", cwd=work) != ""
    ok("sample.py", "out/small", "--max_new_tokens=5", "--prompt_file=-", stdin="long prompt, 東京 " * 9000, cwd=work)


@pytest.mark.parametrize("args, expected", [
    (["nowhere"], "no checkpoint in nowhere"), (["out/small", "--temperature=-1"], "--temperature=-1"),
    (["out/small", "--top_p=0"], "--top_p=0"), (["out/small", "--num_samples=0"], "--num_samples=0"),
    (["out/small", "--max_new_tokens=x"], "max_new_tokens"), (["out/small", "--prompt_file=absent"], "absent"),
    (["out/small", "--prompt=a", "--prompt_file=b"], "not both"), (["out/small", "--device=abacus"], "abacus")])
def test_mistakes(work, args, expected):
    assert expected in fails("sample.py", *args, cwd=work)
