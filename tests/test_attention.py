import math

import pytest
import torch

from attention import tau_attention


def by_definition(lambda_q, lambda_k, v, temperature, log_decay, key_bias):
    """The formula of the doc-string, one number at a time."""
    (B, H, T), Hkv = lambda_q.shape, v.shape[1]
    out = torch.zeros(B, H, T, v.shape[-1], dtype=v.dtype)
    for b in range(B):
        for h in range(H):
            g = h // (H // Hkv)
            for i in range(T):
                logits = [-abs(lambda_q[b, h, i] - lambda_k[b, g, j]) / temperature[h] + key_bias[b, g, j]
                          + sum(log_decay[b, h, j + 1:i + 1]) for j in range(i + 1)]
                weights = [math.exp(logit) for logit in logits]
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / sum(weights) * v[b, g, j]
    return out


def inputs(B=2, H=4, Hkv=2, T=7, D=3, dtype=torch.float64):
    torch.manual_seed(0)
    return (torch.rand(B, H, T, dtype=dtype), torch.rand(B, Hkv, T, dtype=dtype), torch.randn(B, Hkv, T, D, dtype=dtype),
            torch.rand(H, dtype=dtype) + 0.1, -torch.rand(B, H, T, dtype=dtype), torch.randn(B, Hkv, T, dtype=dtype))


def test_formula():
    torch.testing.assert_close(tau_attention(*inputs()), by_definition(*inputs()))


def test_gradients():
    tensors = [tensor.requires_grad_() for tensor in inputs(T=5)]
    torch.autograd.gradcheck(lambda *t: tau_attention(*t), tensors)


def test_decay_of_a_head_is_the_same_at_every_step():
    q, k, v, temperature, _, bias = inputs()
    slope = -torch.rand(4, dtype=torch.float64)
    torch.testing.assert_close(tau_attention(q, k, v, temperature, slope, bias),
                               tau_attention(q, k, v, temperature, slope[:, None].expand(2, 4, 7), bias))


def test_last_queries_only():
    q, k, v, *rest = inputs()
    torch.testing.assert_close(tau_attention(q[..., -2:], k, v, *rest), tau_attention(q, k, v, *rest)[..., -2:, :])


def test_causal():
    q, k, v, temperature, decay, bias = inputs()
    before = tau_attention(q, k, v, temperature, decay, bias)
    for tensor in (q, k, decay, bias):
        tensor[..., 4] += 0.3
    v[:, :, 4] += 1
    after = tau_attention(q, k, v, temperature, decay, bias)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.isclose(before[:, :, 4:], after[:, :, 4:]).all()


def test_values_keep_their_dtype():
    q, k, v, *_ = inputs(dtype=torch.float32)
    assert tau_attention(q, k, v.bfloat16(), 1.0).dtype is torch.bfloat16


@pytest.mark.parametrize("change", [dict(lambda_k=torch.zeros(2, 2, 6)), dict(lambda_q=torch.zeros(2, 3, 7)),
                                    dict(impl="fast")])
def test_refusals(change):
    q, k, v, *_ = inputs(dtype=torch.float32)
    with pytest.raises(ValueError):
        tau_attention(**{"lambda_q": q, "lambda_k": k, "v": v, "temperature": 1.0, **change})
