"""What a CPU trains deep_24x32 with, setting by setting, in turns, so that a busy machine slows all alike: by CPU
seconds of a step, and by the clock.

    python recipes/experiments/deep_speed.py [--dim 64] [--rounds 5]
    python recipes/experiments/deep_speed.py --first --left-to-glibc    without titan/device.py's keep_freed_memory
    python recipes/experiments/deep_speed.py --first --threads 2        one run on two threads

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
from stackgrow.titan.device import keep_freed_memory
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
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--first", action="store_true", help="the first setting only")
    parser.add_argument(
        "--left-to-glibc",
        action="store_true",
        help="hand freed memory back to the kernel, as glibc does by itself",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.left_to_glibc:
        keep_freed_memory()
    names = list(SETTINGS)
    if arguments.first:
        names = names[:1]
    steps = {name: step_of(arguments.dim, *SETTINGS[name]) for name in names}
    for step in steps.values():
        step()  # compiles, and fills caches

    cpu: dict[str, list[float]] = {name: [] for name in names}
    clock: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(arguments.rounds):
        for name, step in steps.items():
            cpu_begun, clock_begun = time.process_time(), time.perf_counter()
            step()
            cpu[name].append(time.process_time() - cpu_begun)
            clock[name].append(time.perf_counter() - clock_begun)

    print(f"24 layers x {arguments.dim}, {arguments.threads} thread(s)")
    print(
        "tokens per CPU second (relative to the first, lowest to highest), of the clock"
    )
    first = statistics.median(cpu[names[0]])
    for name in names:
        middle = statistics.median(cpu[name])
        lowest, highest = TOKENS / max(cpu[name]), TOKENS / min(cpu[name])
        by_clock = TOKENS / statistics.median(clock[name])
        print(
            f"{name:26} {TOKENS / middle:7.0f} {first / middle:6.2f}   "
            f"{lowest:.0f} to {highest:.0f}   {by_clock:7.0f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
