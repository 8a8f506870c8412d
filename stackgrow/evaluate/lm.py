"""A stage's model as lm-eval's LM: the same numbers as lm-eval's own ``hf`` backend has for the exported model.

Every rank is rank 0 of 1 to lm-eval and sees all requests; the model's ranks share the rows of tokens, and each gets
all results back. So all ranks make as many forward passes, as FSDP needs, whatever lm-eval asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from stackgrow.data.tokenizer import Tokenizer
from stackgrow.errors import EvaluationError
from stackgrow.evaluate.scorer import Row, RowScore

Score = Callable[[Sequence[Row]], list[RowScore]]


class StageLM(TemplateLM):
    """Scores text with ``score``, which is collective; a text begins with BOS, as in training and in an export."""

    def __init__(self, score: Score, tokenizer: Tokenizer, max_length: int):
        super().__init__()
        self._score, self._tokenizer, self.max_length = score, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self._tokenizer.bos_id

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids, after BOS unless ``add_special_tokens`` is False."""
        ids = self._tokenizer.encode(string)
        return ids if add_special_tokens is False else [self._tokenizer.bos_id, *ids]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each request (text, context [c], continuation [n]); what does not fit into
        ``max_length`` is left out from the left.

        Raises:
            EvaluationError: a continuation that is empty or does not fit.
        """
        for text, _context, scored in requests:
            if not 1 <= len(scored) <= self.max_length:
                raise EvaluationError(
                    f"a benchmark scores {len(scored)} tokens at once, and the model takes 1 to {self.max_length}: "
                    f"leave its task out of [eval], and run the command again. The text: {text!r:.200}"
                )
        rows = []
        for _text, context, scored in requests:
            ids = context + scored
            rows.append(Row(ids[-(self.max_length + 1) :], len(scored)))
        return [(row.log_likelihood, row.greedy) for row in self._score(rows)]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """The log-likelihood of whole texts: every token once, in windows of ``max_length``."""
        rows: list[Row] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = list(
                get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            )
            for window in windows:
                context, scored = make_disjoint_window(window)
                rows.append(Row(context + scored, len(scored)))
            counts.append(len(windows))

        scores = self._score(rows)
        totals = []
        end = 0
        for count in counts:
            start, end = end, end + count
            totals.append(sum(row.log_likelihood for row in scores[start:end]))
        return totals

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[str]:
        raise NotImplementedError("only tasks that score given text are supported")
