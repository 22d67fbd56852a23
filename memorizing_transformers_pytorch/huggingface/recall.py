"""Recalling passages: they are found by the last tokens of a text, and stand in the cache before it.

Shapes: B rows of the batch, G key/value heads, P positions of passages, T tokens, D head width.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from memorizing_transformers_pytorch.huggingface import prefix as prefixes
from memorizing_transformers_pytorch.huggingface.cache_layers import Prefix
from memorizing_transformers_pytorch.huggingface.calls import Call, runs_inside
from memorizing_transformers_pytorch.huggingface.searching import Query, Search
from memorizing_transformers_pytorch.huggingface.span_layer import SpanOptions
from memorizing_transformers_pytorch.memory import UNKNOWN
from memorizing_transformers_pytorch.utils.context import PerContext

QUERY = 32  # of the last tokens of a text find the passages
ALL_ARE_SCORED = (
    "every token of this call has a label, so none may choose passages: nothing is recalled. Give the label -100 to "
    "the tokens of the prompt, or use memory.score()"
)


class Recall:
    """Places passages before what the model is given."""

    def __init__(self, model: Any, search: Search, options: SpanOptions) -> None:
        self._model, self._options, self.search = model, options, search
        self.asked: PerContext[list[Query] | None] = PerContext(None)  # instead of the last tokens

    def attach(self) -> None:
        if self.search.finder is not None:
            self.search.finder.attach()

    def detach(self) -> None:
        if self.search.finder is not None:
            self.search.finder.detach()

    def before(self, call: Call, module: nn.Module) -> None:
        """Give a call that was checked its passages."""
        prefix = prefixes.prefix_of(call.cache)
        if prefix is None and not self._begins(call):
            return
        if call.enabled and (prefix is None or self._is_due(call, prefix)):
            queries = self._queries(call, prefix)
            if queries is not None:
                prefix = self._renew(call, prefix, queries)
        if prefix is None and call.is_kept:
            nothing = torch.zeros(call.shape[0], 0, dtype=torch.bool, device=self._model.device)
            prefix = prefixes.wrap(call.cache, len(self.search.layers), nothing, self._options.budget)
        if prefix is not None:
            takes = "position_ids" in _parameters(module)
            prefixes.extend(call.given, prefix, call.before, call.shape, takes=takes, hidden=not call.enabled)
            call.prefix, prefix.is_visible = prefix, True

    def check(self, call: Call) -> None:
        """Raises ValueError for a call in which passages cannot stand before the text."""
        is_new = prefixes.prefix_of(call.cache) is None
        if is_new and not self._begins(call):
            return
        if is_new:
            self._check(call)
        if (call.enabled or call.is_kept) and call.given.get("input_ids") is None:
            raise ValueError("passages are found by token ids: give input_ids, or use memory.enabled(False)")

    def _begins(self, call: Call) -> bool:
        """Whether passages can be placed before a text that has none yet."""
        holds_any = call.enabled and self._holds_any(call)
        return (holds_any or call.is_kept) and prefixes.can_begin(call.cache)

    def after(self, call: Call, failed: bool) -> None:
        if call.prefix is not None:
            call.prefix.is_visible = False
            tokens = call.given.get("input_ids")
            if not failed and tokens is not None:
                shown = _shown(call, call.before + call.prefix.size - call.prefix.dropped)
                call.prefix.note(tokens if shown is None else tokens.masked_fill(~shown, UNKNOWN), QUERY)
                if call.recalled is not None:  # these tokens have chosen
                    call.prefix.passed = 0

    def _holds_any(self, call: Call) -> bool:
        return any(call.memories[self.search.kept][0].num_entries[row] for row in call.rows)

    def _check(self, call: Call) -> None:
        prefixes.check(call.cache, call.given.get("attention_mask"))
        if self._model.training and getattr(self._model, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing drops the cache, in which passages stand: call "
                "model.gradient_checkpointing_disable(), or train inside memory.enabled(False)"
            )

    def _is_due(self, call: Call, prefix: Prefix) -> bool:
        """Whether passages are chosen anew: for a new text, or after so many tokens."""
        if not prefix.size and not self._holds_any(call):
            return False
        is_new = call.shape[1] > 1 and not runs_inside("_assisted_decoding")
        return is_new or prefix.is_due or prefix.passed + call.shape[1] >= self._options.every

    def _queries(self, call: Call, prefix: Prefix | None) -> list[Query] | None:
        """For each row of the batch; None if there is nothing to find passages by."""
        call.check_rows()
        asked = self.asked.now
        rows = [call.rows[i * len(call.rows) // call.shape[0]] for i in range(call.shape[0])]
        if asked is not None:
            return asked if len(asked) == len(rows) else [asked[0]] * len(rows)
        tokens, shown = call.tokens, _shown(call, call.before)
        mask = torch.ones_like(tokens, dtype=torch.bool) if shown is None else shown.cpu()
        labels = call.given.get("labels")
        if labels is not None:  # what is to be predicted must not choose
            mask = mask & (labels.cpu() != -100).cumsum(dim=1).eq(0)
            if not bool(mask.any()):
                warnings.warn(ALL_ARE_SCORED, stacklevel=2)
                return None
        texts = [row[kept] for row, kept in zip(tokens, mask, strict=True)]
        if prefix is not None and prefix.tokens is not None and call.shape[1] < QUERY and not self._is_prompt(call):
            known = [row[row != UNKNOWN] for row in prefix.tokens.cpu()]
            texts = [torch.cat((before, new)) for before, new in zip(known, texts, strict=True)]
        return [Query(row, text[-QUERY:]) for row, text in zip(rows, texts, strict=True)]

    def _is_prompt(self, call: Call) -> bool:
        return call.shape[1] > 1 and runs_inside("_prefill")

    def _renew(self, call: Call, prefix: Prefix | None, queries: list[Query]) -> Prefix:
        """Find passages and place them in the cache of the call."""
        stays = prefix is not None and prefix.has_text and not self.search.can_turn
        budget = int(prefix.starts.min()) if stays and prefix is not None else self._options.budget
        recalled, pairs, mask = self.search.pairs_for(queries, budget)
        if call.cache is None:
            call.given["past_key_values"], call.drops_cache = prefixes.new_cache(), call.given.get("use_cache") is False
        if prefix is None:
            prefix = prefixes.wrap(call.cache, len(self.search.layers), mask, self._options.budget)
        prefixes.put(call.cache, prefix, pairs, mask, self.search.turned if self.search.can_turn else None)
        call.recalled = recalled
        return prefix


def _shown(call: Call, start: int) -> Tensor | None:
    """(B, T) bool, False for padding; None where there is none. start: of these tokens in the mask."""
    mask, count = call.given.get("attention_mask"), call.shape[1]
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None or count == 1:
        return None
    if mask.ndim == 4:  # what the last query sees
        mask = mask[:, 0, -1] if mask.dtype == torch.bool else mask[:, 0, -1] >= 0
    shown: Tensor = mask[:, start : start + count].bool().to(call.given["input_ids"].device)
    return shown


def _parameters(module: nn.Module) -> Any:
    return inspect.signature(module.forward).parameters
