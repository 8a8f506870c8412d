"""Documents kept apart in training on a GPU: the loss and its gradients are those of the documents one by one."""

import itertools

import pytest
import torch

from stackgrow.recipe.keys import Model
from stackgrow.titan.model import Llama, model_args

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
T, BOS, CUTS = 512, 1, [0, 100, 130, 400, 512]


@pytest.mark.usefixtures("process_group")
def test_gradients_are_those_of_the_documents_alone() -> None:
    model = Model(
        family="llama2", dim=128, n_layers=2, n_heads=2, ffn_dim=256, vocab_size=300
    )
    tokens = torch.randint(
        2, 300, (1, T), generator=torch.Generator().manual_seed(1)
    ).cuda()
    tokens[0, CUTS[1:-1]] = BOS
    pieces = [tokens[:, a:b] for a, b in itertools.pairwise(CUTS)]
    together, apart = (
        gradients(model, "flex", [tokens]),
        gradients(model, "sdpa", pieces),
    )
    for name, gradient in together.items():
        assert (gradient - apart[name]).norm() < 0.02 * apart[name].norm(), name
    whole = gradients(model, "sdpa", [tokens])
    assert any(
        (g - whole[name]).norm() > 0.1 * g.norm() for name, g in together.items()
    ), "the mask is at work"


def gradients(
    model: Model, attention: str, batches: list[torch.Tensor]
) -> dict[str, torch.Tensor]:
    args = model_args(model, 0, attention=attention)
    args.max_seq_len, args.bos_id = T, BOS if attention == "flex" else None
    llama = Llama(args).cuda()
    with torch.no_grad():
        llama.init_weights()
    for tokens in batches:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = llama(tokens)
        logits.float().logsumexp(-1).sum().backward()
    return {
        name: parameter.grad
        for name, parameter in llama.named_parameters()
        if parameter.grad is not None
    }
