from benchmarks.report import in_own_process
from benchmarks.training import train_step

NANOGPT = """
import dataclasses
import torch
from torch import nn


@dataclasses.dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, 8), "wpe": nn.Embedding(config.block_size, 8)})
        self.lm_head = nn.Linear(8, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets):
        logits = self.lm_head(self.transformer.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1))))
        return logits, nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas, weight_decay=weight_decay)
"""


def test_a_step_of_nanogpts_model_takes_its_own_optimizer(tmp_path):
    """With nanoGPT's interface: nothing of ours is asked of its model."""
    (tmp_path / "model.py").write_text(NANOGPT)
    seconds, memory_mb, products = in_own_process(train_step, "nanogpt", str(tmp_path), 1, 16, 1, False, 1, "cpu")
    assert seconds > 0 and memory_mb > 0
    assert products == 30522 * 8  # the head's; positions are looked up
