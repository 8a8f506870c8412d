"""Initial weights, drawn alike by whoever draws them: every tensor has its own generator."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stackgrow.recipe.keys import Model


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by the key: (seed, tensor name), or with a word between for draws that must differ."""
    import torch

    text = ":".join(str(part) for part in key)
    digest = hashlib.sha256(text.encode()).digest()
    # torch takes seeds of 63 bits.
    seed = int.from_bytes(digest[:8], "little") >> 1
    rng = torch.Generator()
    return rng.manual_seed(seed)


def draw(
    name: str, shape: tuple[int, ...], model: Model, rng: torch.Generator
) -> Tensor:
    """The initial value of a tensor of ``model``, by its ``init``: a matrix [d_out, d_in] or [vocabulary, D], a bias
    (zeros), or an RMSNorm weight (ones). float32 on the CPU."""
    import torch
    from torch import nn

    if name.endswith(".bias"):
        return torch.zeros(shape)
    # An RMSNorm weight.
    if len(shape) == 1:
        return torch.ones(shape)
    # An embedding that is the head, too, makes logits: one of N(0, 1) would make them sqrt(D) times too large.
    if model.tie_embeddings and name == "tok_embeddings.weight":
        name = "output.weight"

    whole = torch.empty(shape)
    if model.init == "paper":
        std = paper_std(name, shape, model.n_layers)
        return whole.normal_(0.0, std, generator=rng)

    # torch's modules as they come, without an initialization of the model's own.
    if model.init == "torch":
        if name == "tok_embeddings.weight":
            return whole.normal_(0.0, 1.0, generator=rng)
        bound = torch_bound(shape)
        return whole.uniform_(-bound, bound, generator=rng)

    # torchtitan's: normal, cut off where it says so.
    std, cut = torchtitan_std(name, model.dim)
    if math.isinf(cut):
        return whole.normal_(0.0, std, generator=rng)
    return nn.init.trunc_normal_(whole, 0.0, std, -cut, cut, generator=rng)


def paper_std(name: str, shape: tuple[int, ...], n_layers: int) -> float:
    """sqrt(2 / (5 d_in)) for the embedding and every linear, 1 / (sqrt(d_in) L) for the MLP output w2
    (official code, tongxuluo/prts; the embedding's d_in is the width D)."""
    d_in = shape[1]
    if name.endswith("feed_forward.w2.weight"):
        return 1 / (math.sqrt(d_in) * n_layers)
    return math.sqrt(2 / (5 * d_in))


def torch_bound(shape: tuple[int, ...]) -> float:
    """1 / sqrt(d_in): torch's own nn.Linear draws uniformly from [-bound, bound], and its nn.Embedding from N(0, 1)."""
    return 1 / math.sqrt(shape[1])


def torchtitan_std(name: str, dim: int) -> tuple[float, float]:
    """Standard deviation and cut-off of torchtitan's Llama 3 (models/llama3/model/model.py, ``depth_init``)."""
    if name == "tok_embeddings.weight":
        return 1.0, math.inf
    if name == "output.weight":
        return dim**-0.5, 3 * dim**-0.5
    if name.endswith(("wo.weight", "w2.weight", "w3.weight")):
        layer = int(name.split(".")[1])
        return 0.02 / math.sqrt(2 * (layer + 1)), 2.0
    return 0.02, 2.0
