"""Reading and writing row by row, a few tokens at a time, with the same results as whole segments.

The text of each row is cut into segments of `segment_length` tokens from where the session began. Inside a segment the
session keeps keys and values of every layer (the usual cache). When a row needs room for a new token, its full segment
is handed over as `MemorizingTransformer.forward` would do: its pairs enter the memory, or XL memory and what that
discards the memory, and the row starts its next segment. So every logit equals that of

    for segment in text.split(segment_length): logits, xl_memories = model(segment, memories, xl_memories)

whichever portions the text comes in, and however uneven the rows are. (One exception: a token that clears the memory at
the start of its segment, SOS, hides it from that whole segment. Where it comes in a later portion than other tokens of
its segment, those have been read with the memory already.)

Shapes: B rows, T new tokens, L segment length, P past pairs, G key/value heads, D head width, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from memorizing_transformers_pytorch.attention.causal import INVISIBLE
from memorizing_transformers_pytorch.memory import UNKNOWN, KNNMemory
from memorizing_transformers_pytorch.memory.entries import as_int64
from memorizing_transformers_pytorch.model.model import Context, MemorizingTransformer
from memorizing_transformers_pytorch.model.segment import (
    Segment,
    check_memories,
    check_tokens,
    find_boundaries,
    make_look_ups,
    shifted,
)
from memorizing_transformers_pytorch.model.state import Written, XLMemories, check_state, hand_over


class _OpenSegment(NamedTuple):
    """The segment in progress of each row: buffers of length L, of which row r has used the first filled[r].

    tokens (B, L), origins (B, L, 3), filled (B,), pairs of each layer (B, G, L, 2, D), inputs of each convolution
    (B, L, C).
    """

    tokens: Tensor
    origins: Tensor
    filled: Tensor
    pairs: list[Tensor]
    conv_inputs: list[Tensor]


class Session:
    """A batch of texts that are being read or written.

    memories: one per memorizing layer with B rows in scope, or None. They grow with every full segment, and by `close`.
    logits: (B, num_tokens), for the token that comes next in each row; zeros before anything was read.
    xl_memories: state to start from, as a call of the model returned it.
    documents: the number of that in each row, kept with its entries; unknown (-1) unless given.
    Raises ValueError for memories or state that do not fit, or a segment_length below 1.
    """

    def __init__(
        self,
        model: MemorizingTransformer,
        memories: Sequence[KNNMemory] | None,
        *,
        batch_size: int,
        segment_length: int,
        xl_memories: XLMemories | None = None,
        documents: Sequence[int] | None = None,
    ) -> None:
        if segment_length < 1:
            raise ValueError(f"expected segment_length to be at least 1, got {segment_length}")
        config = model.config
        self.model = model
        self.memories = check_memories(config, memories, batch_size)
        self.xl_memories = check_state(config, xl_memories, model.initial_state(batch_size))
        self.segment_length = segment_length
        numbers = [UNKNOWN] * batch_size if documents is None else list(documents)
        if len(numbers) != batch_size:
            raise ValueError(f"expected the number of a document for each of {batch_size} rows, got {numbers}")
        self._documents = torch.tensor(numbers, device=model.device)
        self._read_before = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
        self._open = self._open_segment(batch_size)
        self.logits = model.token_emb.weight.new_zeros(batch_size, config.num_tokens)

    def _open_segment(self, batch_size: int) -> _OpenSegment:
        config, length = self.model.config, self.segment_length
        like = self.model.token_emb.weight
        pairs_shape = (batch_size, config.num_kv_heads, length, 2, config.dim_head)
        return _OpenSegment(
            tokens=torch.zeros(batch_size, length, dtype=torch.int64, device=like.device),
            origins=torch.full((batch_size, length, 3), UNKNOWN, device=like.device),
            filled=torch.zeros(batch_size, dtype=torch.int64, device=like.device),
            pairs=[like.new_zeros(pairs_shape) for _ in range(config.depth)],
            conv_inputs=[like.new_zeros(batch_size, length, state.shape[-1]) for state in self.xl_memories.conv_states],
        )

    def checked(self, texts: Sequence[Sequence[int]]) -> list[Tensor]:
        """The texts as tensors, if `read` can take them; else ValueError."""
        if len(texts) != len(self._open.filled):
            raise ValueError(f"expected {len(self._open.filled)} texts, got {len(texts)}")
        kinds = [None if len(text) else torch.int64 for text in texts]  # PyTorch takes an empty list for floats
        tensors = [torch.as_tensor(text, dtype=kind) for text, kind in zip(texts, kinds, strict=True)]
        tensors = [as_int64(text, "token ids").flatten() for text in tensors]
        if any(len(text) > 0 for text in tensors):
            check_tokens(self.model.config, torch.cat(tensors), None)
        return tensors

    @torch.no_grad()
    def read(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row, any number of them, also none. Returns `logits`.

        Raises ValueError, before anything is read, for another number of rows or token ids outside the vocabulary.
        """
        pending = self.checked(texts)
        with self.model.evaluating():
            while any(len(text) > 0 for text in pending):
                filled = self._open.filled.tolist()
                full = [row for row, length in enumerate(filled) if length == self.segment_length]
                self._hand_over([row for row in full if len(pending[row]) > 0])
                room = (self.segment_length - self._open.filled).tolist()
                portions = [text[:free] for text, free in zip(pending, room, strict=True)]
                pending = [text[free:] for text, free in zip(pending, room, strict=True)]
                self._advance(portions)
        return self.logits

    @torch.no_grad()
    def close(self) -> XLMemories:
        """Hand over what the open segments hold, so that the memories know all that was read. Returns the state."""
        self._hand_over([row for row, filled in enumerate(self._open.filled.tolist()) if filled > 0])
        return self.xl_memories

    def _advance(self, portions: Sequence[Tensor]) -> None:
        """Run new tokens of each row, no more than its open segment has room for, and append them to it."""
        tokens = torch.nn.utils.rnn.pad_sequence(list(portions), batch_first=True).to(self.model.device)
        counts = torch.tensor([len(portion) for portion in portions], device=self.model.device)
        place = self._open.filled[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        rows, columns = (torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]).nonzero(as_tuple=True)
        at = rows, place[rows, columns]
        self._open.tokens[at] = tokens[rows, columns]
        positions = self._read_before[rows] + at[1]
        self._open.origins[at] = torch.stack((self._documents[rows], positions, tokens[rows, columns]), -1)

        hidden, written = self.model.run_layers(tokens, self._context(place, counts))
        for buffer, pairs in zip(self._open.pairs, written.pairs, strict=True):
            buffer.transpose(1, 2)[at] = pairs.transpose(1, 2)[rows, columns].to(buffer)
        for buffer, inputs in zip(self._open.conv_inputs, written.conv_inputs, strict=True):
            buffer[at] = inputs[rows, columns].to(buffer)
        self._open.filled.add_(counts)
        moved = counts.nonzero().squeeze(-1)
        logits = self.model.to_logits(hidden[moved, counts[moved] - 1])
        self.logits = self.logits.index_copy(0, moved, logits.to(self.logits))

    def _context(self, place: Tensor, counts: Tensor) -> Context:
        """What new tokens at `place` (B, T) of their open segments see: XL memory, the open segment, and each other."""
        config = self.model.config
        filled = self._open.filled
        used = int(filled.max())
        starts = find_boundaries(self._segment(slice(None), filled + counts), config).starts
        state = self.xl_memories if starts is None else self.xl_memories.cleared(starts)

        own_places = torch.arange(used, device=place.device).expand(len(filled), used)
        own = place[:, :, None] - torch.cat((own_places, place), dim=1)[:, None]
        visible = torch.cat((own_places < filled[:, None], torch.ones_like(place, dtype=torch.bool)), dim=1)
        own = own.where(visible[:, None], INVISIBLE).clamp_min(INVISIBLE)
        xl = place[:, :, None] - torch.arange(-state.length, 0, device=place.device)
        if state.mask is not None:
            xl = xl.where(state.mask[:, None], INVISIBLE)

        xl_of = dict(zip(config.layers_with_xl, shifted(state, config.shift_xl_memories_down), strict=True))
        pasts = [buffer[:, :, :used] for buffer in self._open.pairs]
        for number, pairs in xl_of.items():
            pasts[number - 1] = torch.cat((pairs.to(pasts[number - 1]), pasts[number - 1]), dim=2)
        return Context(
            pasts=pasts,
            distances=own,
            xl_distances=torch.cat((xl, own), dim=2),
            look_ups=make_look_ups(config, self.memories, hidden=starts),
            conv_states=self._conv_states(state) or [None] * len(config.layers_with_memory),
        )

    def _conv_states(self, state: XLMemories) -> list[Tensor]:
        """The last W - 1 inputs of each convolution before the next token of each row."""
        states = []
        for before, inputs in zip(state.conv_states, self._open.conv_inputs, strict=True):
            width = before.shape[1]
            last = self._open.filled[:, None] + torch.arange(width, device=before.device)
            joined = torch.cat((before.to(inputs), inputs), dim=1)
            states.append(torch.take_along_dim(joined, last.unsqueeze(-1), dim=1))
        return states

    def _segment(self, rows: Tensor | slice, filled: Tensor) -> Segment:
        """The first `filled` tokens of the open segments of these rows."""
        length = max(int(filled.max()), 1)
        mask = torch.arange(length, device=filled.device) < filled[:, None]
        return Segment(self._open.tokens[rows, :length], self._open.origins[rows, :length], mask, None)

    def _hand_over(self, rows: Sequence[int]) -> None:
        """Finish the open segments of these rows, and begin new ones."""
        if not rows:
            return
        config, chosen = self.model.config, torch.tensor(rows, device=self.model.device)
        segment = self._segment(chosen, self._open.filled[chosen])
        length = segment.tokens.shape[1]
        written = Written(
            [pairs[chosen, :, :length] for pairs in self._open.pairs],
            [inputs[chosen, :length] for inputs in self._open.conv_inputs],
        )
        boundaries = find_boundaries(segment, config)
        state = self.xl_memories.taken(chosen)
        if not self.memories:
            state = hand_over(config, segment, boundaries, state, written, None)
        else:
            scope = self.memories[0].scoped_indices
            with self.memories.at_batch_indices([scope[row] for row in rows]):
                state = hand_over(config, segment, boundaries, state, written, self.memories)
        self.xl_memories = self.xl_memories.replaced(chosen, state)
        self._read_before[chosen] += self._open.filled[chosen]
        self._open.filled[chosen] = 0
