"""The recurrence of recall heads against its definition, and its gradients against finite differences."""

import pytest
import torch

from ops import recurrence as module
from ops.attention import load_walk
from ops.recurrence import Doubling, recurrence


@pytest.mark.parametrize("impl", [load_walk, lambda: Doubling], ids=["compiled", "doubling"])
@pytest.mark.parametrize("T", [1, 2, 13, 64])
def test_is_its_definition(impl, T, monkeypatch):
    monkeypatch.setattr(module, "on_cpu", impl)
    torch.manual_seed(0)
    random = lambda *shape: torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    a, b, first = random(2, T, 3, 1), random(2, T, 3, 5), random(2, 1, 3, 5)
    y, expected = first, []
    for t in range(T):
        y = a[:, t : t + 1] * y + b[:, t : t + 1]
        expected.append(y)
    torch.testing.assert_close(recurrence(a, b, first), torch.cat(expected, 1))
    half = T // 2  # in two pieces
    before = recurrence(a[:, :half], b[:, :half], first)[:, -1:] if half else first
    torch.testing.assert_close(recurrence(a[:, half:], b[:, half:], before), torch.cat(expected[half:], 1))
    assert torch.autograd.gradcheck(recurrence, (a, b, first)) and torch.autograd.gradcheck(recurrence, (a, b))
    strided = b.detach().float().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(recurrence(a.detach().float(), strided, first.detach().float()), torch.cat(expected, 1).detach().float())


def test_one_token_after_the_other_gives_the_same_bits():
    """Compiled, as one after the other in torch: a vector of a recall head is the same to the last bit however the text is cut."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 50, 3, 1), torch.randn(2, 50, 3, 33)
    y, expected = torch.zeros(2, 1, 3, 33), []
    for t in range(50):
        y = a[:, t : t + 1] * y + b[:, t : t + 1]
        expected.append(y)
    whole = recurrence(a, b)
    assert torch.equal(whole, torch.cat(expected, 1))
    assert torch.equal(recurrence(a[:, 20:], b[:, 20:], whole[:, 19:20]), whole[:, 20:])
