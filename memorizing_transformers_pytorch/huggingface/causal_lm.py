"""`MemorizingTransformer` as a model of transformers: AutoModelForCausalLM, save_pretrained, generate, Trainer.

Shapes: B rows, T tokens, V tokens in the vocabulary.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.config import IGNORE_INDEX, ModelConfig
from memorizing_transformers_pytorch.model.model import MemorizingTransformer
from memorizing_transformers_pytorch.model.session import Session

MODEL_TYPE = "memorizing_transformer"
Output: Any = CausalLMOutputWithPast


class MemorizingTransformerConfig(PreTrainedConfig):  # type: ignore[no-untyped-call]
    """model: the fields of `ModelConfig`. segment_length: tokens that are read at once, and so the local context."""

    model_type = MODEL_TYPE
    attribute_map: ClassVar[dict[str, str]] = {}

    def __init__(self, model: dict[str, Any] | None = None, segment_length: int = 512, **options: Any) -> None:
        known = ModelConfig.from_dict(model or {"num_tokens": 256, "dim": 64, "depth": 2})
        if segment_length < 1:
            raise ValueError(f"expected segment_length to be at least 1, got {segment_length}")
        self.model = known.to_dict()
        self.segment_length = segment_length
        self.vocab_size = known.num_tokens
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = known.dim, known.depth, known.heads
        derived = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        options = {name: option for name, option in options.items() if name not in derived}
        options.setdefault("use_cache", False)
        super().__init__(**{**options, "tie_word_embeddings": known.tie_embeddings})

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.model)


class ReadingCache:
    """What a batch of texts has left behind: its memories, and the segments in progress. For `past_key_values`."""

    is_compileable = False

    def __init__(self, session: Session) -> None:
        self.session = session
        self._length = 0

    def read(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens and mask (B, T) -> the logits (B, 1, V) of what comes next."""
        self._length += tokens.shape[1]
        texts = [row[seen].tolist() for row, seen in zip(tokens.cpu(), mask.cpu(), strict=True)]
        return self.session.read(texts).unsqueeze(1)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens that were read, padding included."""
        return self._length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("expected greedy decoding or sampling: a memory cannot follow beams")

    def crop(self, *_: Any) -> None:
        raise ValueError("expected greedy decoding or sampling: what is remembered cannot be taken back")


class MemorizingTransformerForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[no-untyped-call]
    """A `MemorizingTransformer` that reads a text of any length segment by segment, with a memory of its own for each
    row; see `MemorizingTransformerConfig`."""

    config_class = MemorizingTransformerConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    accepts_loss_kwargs = False  # `Trainer` divides the loss when it accumulates gradients
    _tied_weights_keys = {"model.to_logits.1.weight": "model.token_emb.weight"}  # noqa: RUF012

    def __init__(self, config: MemorizingTransformerConfig) -> None:
        super().__init__(config)
        self.model = MemorizingTransformer.from_config(config.model_config)
        if not config.tie_word_embeddings:
            self._tied_weights_keys = {}
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: Any) -> None:
        """They were initialised when they were made."""

    def get_input_embeddings(self) -> Any:
        return self.model.token_emb

    def set_input_embeddings(self, value: Any) -> None:
        self.model.token_emb = value

    def get_output_embeddings(self) -> Any:
        return self.model.to_logits[1]

    def resize_token_embeddings(self, *_: Any, **__: Any) -> Any:
        """A vocabulary belongs to the configuration. Raises ValueError."""
        raise ValueError(f"expected the vocabulary of {self.config.vocab_size} tokens to stay, got another size")

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: ReadingCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **_: Any,
    ) -> Any:
        """Read texts from their beginning; with use_cache, as `generate` does, or go on with them.

        input_ids: (B, T), of any length. attention_mask: (B, T), 0 for padding, anywhere in a row.
        labels: (B, T), usually the input_ids: they are shifted here; -100 is not scored.
        past_key_values: what a call with use_cache has returned.

        Returns a `CausalLMOutputWithPast` with logits (B, T, V); with use_cache (without gradient) they are only those
        of the last token of each row (B, 1, V).
        """
        input_ids = as_int64(input_ids, "input_ids")
        labels = None if labels is None else as_int64(labels, "labels")
        seen = torch.ones_like(input_ids).bool()
        if attention_mask is not None:
            seen = attention_mask[:, -input_ids.shape[1] :].bool()
        if use_cache or past_key_values is not None:
            if labels is not None:
                raise ValueError("expected no labels with use_cache, got some")
            cache = past_key_values or self._empty_cache(len(input_ids))
            return Output(logits=cache.read(input_ids, seen), past_key_values=cache)
        logits = self._read(input_ids, seen)
        loss = None if labels is None else _loss(logits, labels, seen)
        return Output(loss=loss, logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)

    def read(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> ReadingCache:
        """What `generate(past_key_values=...)` goes on from, once, given these texts (B, T) and what follows them."""
        cache: ReadingCache = self(input_ids, attention_mask, use_cache=True).past_key_values
        return cache

    def _empty_cache(self, rows: int) -> ReadingCache:
        memories = self.model.create_knn_memories(batch_size=rows)
        session = Session(self.model, memories, batch_size=rows, segment_length=self.config.segment_length)
        return ReadingCache(session)

    def _read(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """(B, T) -> logits (B, T, V), with gradient. Segments are of tokens, not of padding."""
        order = (~seen).long().argsort(dim=1, stable=True)
        packed, mask = tokens.gather(1, order), seen.gather(1, order)
        logits, state, size = [], None, self.config.segment_length
        with self.model.knn_memories_context(batch_size=len(tokens)) as memories:
            for start in range(0, tokens.shape[1], size):
                segment = slice(start, start + size)
                result = self.model(packed[:, segment], memories, state, mask=mask[:, segment])
                found, state = result if self.model.carries_state else (result, None)
                logits.append(found)
        back = order.argsort(dim=1).unsqueeze(-1)
        return torch.cat(logits, dim=1).gather(1, back.expand(-1, -1, self.config.vocab_size))


def _loss(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """The mean loss of each token that has one before it, in nats."""
    unscored = ~(seen[:, 1:] & seen[:, :-1])
    return F.cross_entropy(logits[:, :-1].float().mT, labels[:, 1:].masked_fill(unscored, IGNORE_INDEX))


AutoConfig.register(MODEL_TYPE, MemorizingTransformerConfig)
AutoModelForCausalLM.register(MemorizingTransformerConfig, MemorizingTransformerForCausalLM)
AutoTokenizer.register(MemorizingTransformerConfig, fast_tokenizer_class=PreTrainedTokenizerFast)  # type: ignore
