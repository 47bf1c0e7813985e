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
    a, b = random(2, T, 3, 1), random(2, T, 3, 5)
    expected = [b[:, :1]]
    for t in range(1, T):
        expected.append(a[:, t : t + 1] * expected[-1] + b[:, t : t + 1])
    expected = torch.cat(expected, 1)
    torch.testing.assert_close(recurrence(a, b), expected)
    half = -(-T // 2)  # in two pieces, the second from the last of the first on
    last = recurrence(a[:, :half], b[:, :half])[:, -1:]
    torch.testing.assert_close(recurrence(a[:, half - 1 :], torch.cat([last, b[:, half:]], 1)), expected[:, half - 1 :])
    assert torch.autograd.gradcheck(recurrence, (a, b))
    strided = b.detach().float().transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(recurrence(a.detach().float(), strided), expected.detach().float())


def test_one_token_after_the_other_gives_the_same_bits():
    """Compiled, as one after the other in torch: from equal terms, running means are equal to the last bit however the text is cut."""
    torch.manual_seed(0)
    a, b = torch.rand(2, 50, 3, 1), torch.randn(2, 50, 3, 33)
    expected = [b[:, :1]]
    for t in range(1, 50):
        expected.append(a[:, t : t + 1] * expected[-1] + b[:, t : t + 1])
    whole = recurrence(a, b)
    assert torch.equal(whole, torch.cat(expected, 1))
    assert torch.equal(recurrence(a[:, 19:], torch.cat([whole[:, 19:20], b[:, 20:]], 1)), whole[:, 19:])
