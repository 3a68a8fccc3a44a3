"""What `launch.py` has torchrun start beside windlass: a training script as short as one writes it, with torch alone.

It trains a small model on random tokens under DistributedDataParallel, saves nothing, and so begins again at step 0.
Rank 0 adds a line to a file after each step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Model(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, hidden_size)
        layer = nn.TransformerEncoderLayer(
            hidden_size, num_heads, intermediate_size, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.head = nn.Linear(hidden_size, vocab_size, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(batch, seq_len) int64 -> (batch, seq_len, vocab_size)."""
        mask = nn.Transformer.generate_square_subsequent_mask(input_ids.shape[1])
        return self.head(self.layers(self.embed(input_ids), mask=mask, is_causal=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", type=json.loads, help="keyword arguments of the model, as JSON")
    parser.add_argument("batch_size", type=int)
    parser.add_argument("seq_len", type=int)
    parser.add_argument("file", type=Path, help="gets an object a line for each step")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(Model(**options.shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    vocab_size = options.shape["vocab_size"]
    for step in itertools.count(1):
        tokens = torch.randint(0, vocab_size, (options.batch_size, options.seq_len + 1))
        logits = model(tokens[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, vocab_size), tokens[:, 1:].reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if dist.get_rank() == 0:
            with options.file.open("a") as file:
                file.write(json.dumps({"step": step, "life": os.environ["TORCHELASTIC_RESTART_COUNT"]}) + "\n")


if __name__ == "__main__":
    main()
