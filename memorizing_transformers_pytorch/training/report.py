"""What a run writes down for people: tables and plots."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

LABELS = {
    "off": "memory off",
    "on": "memory on",
    "other": "another document's memory",
    "shuffled": "own memory, values shuffled",
}


class Validation(NamedTuple):
    """Mean held-out losses, in nats per token, after so many training steps."""

    step: int
    off: float
    on: float


def loss_table(losses: Mapping[str, Tensor]) -> str:
    """Losses (documents, positions) of each mode as a table: mean, perplexity, and how often "off" is beaten."""
    lines = [f"{'':32}{'loss':>8}{'perplexity':>12}{'better than off in':>22}"]
    documents = losses["off"].shape[0]
    for mode, loss in losses.items():
        mean = loss.mean()
        better = int((loss.mean(dim=1) < losses["off"].mean(dim=1)).sum())
        beaten = "" if mode == "off" else f"{better} of {documents} documents"
        lines.append(f"{LABELS[mode]:32}{mean.item():8.3f}{mean.exp().item():12.2f}{beaten:>22}")
    return "\n".join(lines)


def check_plots_are_possible() -> None:
    """Raises ValueError, with the remedy, if matplotlib is not installed: better before a training than after it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("expected matplotlib for the plots: pip install 'memorizing_transformers_pytorch[plot]'")


def plot_curves(
    validations: Sequence[Validation],
    losses: Mapping[str, Tensor],
    memory_from_step: int,
    segment_length: int,
    path: Path,
) -> None:
    """Held-out loss while training, and by position in the document, with the memory on and off, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    training, position = figure.subplots(1, 2)
    colors = {"off": "tab:gray", "on": "tab:blue", "other": "tab:orange", "shuffled": "tab:red"}
    steps = [validation.step for validation in validations]
    for mode in ("off", "on"):
        values = [getattr(validation, mode) for validation in validations]
        training.plot(steps, values, marker=".", color=colors[mode], label=LABELS[mode])
    training.axvline(
        memory_from_step, color="black", linewidth=0.8, linestyle=":", label="memory used in training from here"
    )
    training.set(
        xlabel="training step",
        ylabel="held-out loss (nats per token)",
        title="While training (first quarter of each document)",
    )
    for mode, loss in losses.items():
        starts = range(0, loss.shape[1], segment_length)
        means = [loss[:, start : start + segment_length].mean().item() for start in starts]
        position.plot(starts, means, color=colors[mode], label=LABELS[mode])
    position.set(xlabel="tokens of the document already read", title="After training, by position in the document")
    for axes in (training, position):
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2, fontsize=8, frameon=False)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
