"""The losses of an evaluation in numbers: means, what the memory changes, and how sure that is. Knows no files.

How sure: by the percentile bootstrap (Efron 1979), with the document as its unit, as tokens of a document depend on
each other. Documents are drawn, with replacement; a mean is that over all tokens of the documents drawn. Every mode is
averaged over the same draws, so differences between modes are paired.

Shapes: C modes, N documents, S draws, P ranges of positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from memorizing_transformers_pytorch.evaluation.controls import CONTROLS
from memorizing_transformers_pytorch.evaluation.evaluate import Losses, mode_of

MAX_BLOCK_NUMBERS = 2**22  # of draws held at once, which are as many numbers as there are documents
FIRST_POSITIONS = 16  # tokens in the first range of positions; from there ranges grow by the square root of two


class Interval(NamedTuple):
    """Where the middle 95% of the draws lie."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A number for these documents, and the 95% interval of it for documents like them (None for one document)."""

    value: float
    interval: Interval | None

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


class ModeSummary(NamedTuple):
    """loss: nats per token. perplexity: per token. bits_per_byte: None if the bytes are not known.

    change: of perplexity against memory off, as a share; negative is better. better_documents: how many of them have a
    lower loss than with memory off.
    """

    loss: Estimate
    perplexity: Estimate
    bits_per_byte: float | None
    change: Estimate
    better_documents: int


class Positions(NamedTuple):
    """Mean loss by position in the document: of the tokens edges[i] to edges[i + 1] - 1 after the first one.

    edges (P + 1,). documents, tokens (P,): how many have such positions. losses: of each mode (P,).
    """

    edges: list[int]
    documents: list[int]
    tokens: list[int]
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class Summary:
    """names, tokens (scored), document_losses: of each document. controls: loss above that of the right memory, which
    is the one with `controls_at` entries."""

    names: list[str]
    tokens: list[int]
    modes: dict[str, ModeSummary]
    controls_at: int | None
    controls: dict[str, Estimate]
    positions: Positions
    document_losses: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """Everything, with values that JSON can hold."""
        return {
            "modes": {
                name: {k: v.to_dict() if isinstance(v, Estimate) else v for k, v in mode._asdict().items()}
                for name, mode in self.modes.items()
            },
            "controls_at": self.controls_at,
            "controls": {
                name: {"loss_above_right_memory": difference.to_dict(), "verdict": verdict(difference)}
                for name, difference in self.controls.items()
            },
            "positions": self.positions._asdict(),
            "documents": [
                {"name": name, "tokens": tokens, "loss": {m: of[n] for m, of in self.document_losses.items()}}
                for n, (name, tokens) in enumerate(zip(self.names, self.tokens, strict=True))
            ],
        }


def verdict(difference: Estimate) -> str:
    """Whether a loss is above another: "worse" if all of the interval is, "not worse" if not, "unknown" without one."""
    if difference.interval is None:
        return "unknown"
    return "worse" if difference.interval.low > 0 else "not worse"


def summarise(
    losses: Losses,
    *,
    names: Sequence[str],
    num_bytes: Sequence[int] | None = None,
    controls_at: int | None = None,
    draws: int = 10_000,
    seed: int = 0,
) -> Summary:
    """losses: as `evaluate` returns them, with "off" among the modes. names: of each document. num_bytes: UTF-8 bytes
    of what of it is scored, that is without its first token.

    Documents without losses are left out. Raises ValueError for other numbers of names or bytes than documents, or
    without "off".
    """
    if "off" not in losses:
        raise ValueError(f"expected 'off' among the modes, got {list(losses)}")
    if len(names) != len(losses["off"]) or (num_bytes is not None and len(num_bytes) != len(names)):
        got = (len(names), len(names if num_bytes is None else num_bytes))
        raise ValueError(f"expected names and bytes of {len(losses['off'])} documents, got {got}")
    used = [n for n, loss in enumerate(losses["off"]) if len(loss) > 0]
    losses = {mode: [of_mode[n] for n in used] for mode, of_mode in losses.items()}
    counts = np.array([len(loss) for loss in losses["off"]])
    sums = np.array([[loss.sum(dtype=np.float64) for loss in of_mode] for of_mode in losses.values()])
    means, drawn = sums.sum(axis=1) / counts.sum(), drawn_means(sums, counts, draws=draws, seed=seed)
    rows, by_document = {mode: row for row, mode in enumerate(losses)}, sums / counts
    total_bytes = None if num_bytes is None else sum(int(num_bytes[n]) for n in used)

    def difference(mode: str, other: str) -> Estimate:
        one, two = rows[mode], rows[other]
        return Estimate(float(means[one] - means[two]), interval(None if drawn is None else drawn[one] - drawn[two]))

    def summary(mode: str) -> ModeSummary:
        row = rows[mode]
        loss = Estimate(float(means[row]), interval(None if drawn is None else drawn[row]))
        bits = loss.value * float(counts.sum()) / math.log(2)
        return ModeSummary(
            loss=loss,
            perplexity=_mapped(np.exp, loss),
            bits_per_byte=None if not total_bytes else bits / total_bytes,
            change=_mapped(np.expm1, difference(mode, "off")),
            better_documents=int((by_document[row] < by_document[rows["off"]]).sum()),
        )

    return Summary(
        names=[names[n] for n in used],
        tokens=counts.tolist(),
        modes={mode: summary(mode) for mode in losses},
        controls_at=controls_at,
        controls={name: difference(name, mode_of(controls_at or 0)) for name in CONTROLS if name in losses},
        positions=by_position(losses),
        document_losses={mode: by_document[row].tolist() for mode, row in rows.items()},
    )


def _mapped(function: np.ufunc, estimate: Estimate) -> Estimate:
    """The estimate of an increasing function: percentiles go where their values go."""
    ends = None if estimate.interval is None else Interval(*map(float, function(estimate.interval)))
    return Estimate(float(function(estimate.value)), ends)


def by_position(losses: Losses) -> Positions:
    """Mean loss of each mode in ranges of positions that grow."""
    longest = max(len(loss) for loss in losses["off"])
    edges = [0]
    while edges[-1] < longest:
        edges.append(min(round(FIRST_POSITIONS * 2 ** ((len(edges) - 1) / 2)), longest))
    ends = [np.minimum(edges, len(loss)) for loss in losses["off"]]
    counts = np.array([np.diff(end) for end in ends])
    means = {}
    for mode, of_mode in losses.items():
        totals = [np.concatenate(([0.0], np.cumsum(loss, dtype=np.float64))) for loss in of_mode]
        sums = np.array([np.diff(total[end]) for total, end in zip(totals, ends, strict=True)])
        means[mode] = (sums.sum(axis=0) / counts.sum(axis=0)).tolist()
    return Positions(edges, (counts > 0).sum(axis=0).tolist(), counts.sum(axis=0).tolist(), means)


def drawn_means(sums: np.ndarray, counts: np.ndarray, *, draws: int = 10_000, seed: int = 0) -> np.ndarray | None:
    """sums (C, N) of losses and counts (N,) of tokens, of each document -> means over all tokens of each draw (C, S).

    None for a single document, which says nothing about others. Raises ValueError for other shapes, documents without
    tokens, or less than one draw.
    """
    if sums.ndim != 2 or counts.shape != sums.shape[1:]:
        raise ValueError(f"expected sums (modes, documents) and counts (documents,), got {sums.shape}, {counts.shape}")
    if draws < 1:
        raise ValueError(f"expected at least 1 draw, got {draws}")
    number = len(counts)
    if number == 0 or counts.min() < 1:
        raise ValueError(f"expected documents with at least 1 token each, got {counts.tolist()}")
    if number == 1:
        return None
    random = np.random.default_rng(seed)
    parts = []
    block = max(MAX_BLOCK_NUMBERS // number, 1)
    for start in range(0, draws, block):
        taken = random.multinomial(number, np.full(number, 1 / number), size=min(block, draws - start))
        parts.append((sums @ taken.T) / (counts @ taken.T))
    return np.concatenate(parts, axis=1)


def interval(values: np.ndarray | None) -> Interval | None:
    """The 95% percentile interval of values (S,), one for each draw; None for None."""
    if values is None:
        return None
    low, high = np.quantile(values, [0.025, 0.975])
    return Interval(float(low), float(high))
