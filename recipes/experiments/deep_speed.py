"""What one CPU thread trains deep_24x32 with, setting by setting: CPU seconds of a step, in turns, so that a busy
machine slows all alike.

    OMP_NUM_THREADS=1 python recipes/experiments/deep_speed.py [--dim 64] [--rounds 5]

A step is the model's forward and backward pass over 4,096 random tokens and AdamW's update, without what surrounds it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torchtitan.models.llama3 import Transformer

from stackgrow.recipe.keys import Model
from stackgrow.titan.model import model_args

TOKENS = 4096  # train.global_batch_tokens
VOCAB = 2048
SETTINGS = {  # sequence, micro-batch, heads, dtype, compiled; the first is what the others are divided by
    "seq 128, micro-batch 16": (128, 16, 1, torch.float32, False),
    "seq 128, micro-batch 8": (128, 8, 1, torch.float32, False),
    "seq 128, micro-batch 32": (128, 32, 1, torch.float32, False),
    "seq 256, micro-batch 8": (256, 8, 1, torch.float32, False),
    "two heads for each": (128, 16, 2, torch.float32, False),
    "bf16": (128, 16, 1, torch.bfloat16, False),
    "compiled blocks and loss": (128, 16, 1, torch.float32, True),
}


def step_of(
    dim: int, seq: int, micro: int, heads: int, dtype: torch.dtype, compiled: bool
) -> Callable[[], None]:
    heads *= dim // 32
    model = Model(
        family="llama2",
        dim=dim,
        n_layers=24,
        n_heads=heads,
        ffn_dim=dim * 11 // 4,
        vocab_size=VOCAB,
    )
    arguments = model_args(model, seed=1)
    arguments.max_seq_len = seq
    net = Transformer(arguments)
    with torch.no_grad():
        net.init_weights()
    loss_of = torch.nn.functional.cross_entropy
    if compiled:
        loss_of = torch.compile(loss_of)
        for name, block in list(net.layers.items()):
            net.layers[name] = torch.compile(block, fullgraph=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=True)
    rows = torch.randint(0, VOCAB, (TOKENS // seq, seq + 1))

    def step() -> None:
        optimizer.zero_grad()
        for part in rows.split(micro):
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits = net(part[:, :-1])
            loss = loss_of(logits.flatten(0, 1).float(), part[:, 1:].flatten())
            (loss * len(part) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dim", type=int, default=32, choices=[32, 64, 96])
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = {
        name: step_of(arguments.dim, *setting) for name, setting in SETTINGS.items()
    }
    for step in steps.values():
        step()  # compiles, and fills caches
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    first = statistics.median(next(iter(seconds.values())))
    print(
        f"24 layers x {arguments.dim}: tokens per CPU second, relative to the first, lowest to highest"
    )
    for name, taken in seconds.items():
        middle, span = (
            statistics.median(taken),
            f"{TOKENS / max(taken):.0f} to {TOKENS / min(taken):.0f}",
        )
        print(f"{name:26} {TOKENS / middle:7.0f} {first / middle:6.2f}   {span}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
