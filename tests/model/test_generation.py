"""Generation writes what teacher forcing through segments would predict, and remembers what it has read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from memorizing_transformers_pytorch import MemorizingTransformer
from memorizing_transformers_pytorch.model.generation import generate, sample, stream
from memorizing_transformers_pytorch.model.session import Session
from memorizing_transformers_pytorch.model.state import XLMemories
from tests.model.helpers import (
    EOS,
    EVERYTHING,
    NUM_TOKENS,
    SOS,
    VARIANTS,
    Call,
    assert_same_contents,
    assert_same_entries,
    call,
    contents,
    entries,
    random_tokens,
    read,
    refused,
    stateful_variants,
    tiny,
    variants,
)

L = 7  # tokens of a segment

MARKED = {"clear_memories_on_sos_token_id": SOS, "clear_memories_on_eos_token_id": EOS}
MORE_VARIANTS = {
    **VARIANTS,
    "xl longer than a segment": {"xl_max_memories": 9},
    "xl of one pair": {"xl_max_memories": 1, "shift_xl_memories_down": 2},
    "heads": {"knn_attn_heads": 6, "num_kv_heads": 2, "memorizing_layers": (1, 3), "shift_knn_memories_down": 1},
    "multi-query": {"num_kv_heads": 1, "heads": 3, "xl_max_memories": 2, "xl_memory_layers": 2},
    "no memorizing layer": {"memorizing_layers": (), "xl_max_memories": 3},
    "tied, wide convolution": {"tie_embeddings": True, "short_conv": 9, "xl_max_memories": 4},
    "dropout": {"attn_dropout": 0.4, "ff_dropout": 0.4},
}
more_variants = pytest.mark.parametrize("variant", MORE_VARIANTS.values(), ids=MORE_VARIANTS.keys())


def random_texts(*lengths: int) -> list[list[int]]:
    return [random_tokens(1, length)[0].tolist() for length in lengths]


def forced(model: MemorizingTransformer, text: Sequence[int], memories: Any, state: XLMemories | None = None) -> Call:
    """Logits of a whole text (n, num_tokens), read in segments of L tokens, as the reference."""
    with torch.no_grad(), model.evaluating():
        logits, state = read(model, torch.tensor([text]), memories, L, state)
    return Call(logits[0], state)


def greedy(model: MemorizingTransformer, texts: Any, memories: Any = None, **arguments: Any) -> list[list[int]]:
    return generate(model, texts, memories, **{"max_new_tokens": 9, "temperature": 0, "segment_length": L, **arguments})


# Against teacher forcing


@pytest.mark.parametrize("marked", [False, True], ids=["", "with EOS and SOS"])
@more_variants
def test_greedy_tokens_and_memories_are_those_of_teacher_forcing(variant: dict[str, Any], marked: bool) -> None:
    model, texts = tiny(**variant, **MARKED), random_texts(17, 1, 30)
    with torch.no_grad():
        model.to_logits[1].bias[[SOS, EOS]] = -1e4  # never written: what was written before them would have to change
    if marked:
        texts[0][3], texts[2][9], texts[2][20], texts[2][29] = SOS, EOS, SOS, EOS
    memories = model.create_knn_memories(batch_size=3)
    written = greedy(model, texts, memories, max_new_tokens=16)
    for row, (text, new) in enumerate(zip(texts, written, strict=True)):
        alone = model.create_knn_memories(batch_size=1)
        logits = forced(model, [*text, *new], alone).result
        assert new == logits[len(text) - 1 : -1].argmax(dim=-1).tolist()
        for memory, own in zip(memories, alone, strict=True):
            assert_same_entries(entries(memory, row), entries(own, 0), tolerance=1e-4)


@pytest.mark.parametrize("portions", [[30], [1] * 30, [7, 7, 7, 9], [3, 12, 1, 14], [0, 6, 2, 0, 22]], ids=str)
@more_variants
def test_logits_do_not_depend_on_the_portions_in_which_a_text_comes(
    variant: dict[str, Any], portions: list[int]
) -> None:
    model = tiny(**variant)
    texts = random_texts(sum(portions), sum(portions))
    memories, alone = model.create_knn_memories(batch_size=2), [model.create_knn_memories(batch_size=1) for _ in texts]
    expected = [forced(model, text, own) for text, own in zip(texts, alone, strict=True)]
    session, start = Session(model, memories, batch_size=2, segment_length=L), 0
    for portion in portions:
        logits = session.read([text[start : start + portion] for text in texts])
        start += portion
        if start > 0:
            for row in range(2):
                torch.testing.assert_close(logits[row], expected[row].result[start - 1], rtol=0, atol=1e-4)
    session.close()
    for row in range(2):
        for memory, own in zip(memories, alone[row], strict=True):
            assert_same_entries(entries(memory, row), entries(own, 0), tolerance=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", [{}, EVERYTHING], ids=["plain", "everything"])
def test_rows_may_be_read_as_unevenly_as_one_likes(variant: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    model, texts = tiny(**variant), random_texts(25, 25, 25)
    expected = [forced(model, text, model.create_knn_memories(batch_size=1)).result for text in texts]
    session = Session(model, model.create_knn_memories(batch_size=3), batch_size=3, segment_length=L)
    starts = [0, 0, 0]
    for _ in range(8):
        counts = torch.randint(0, 6, (3,)).tolist()
        logits = session.read([text[at : at + n] for text, at, n in zip(texts, starts, counts, strict=True)])
        starts = [min(at + n, 25) for at, n in zip(starts, counts, strict=True)]
        for row, start in enumerate(starts):
            if start > 0:
                torch.testing.assert_close(logits[row], expected[row][start - 1], rtol=0, atol=1e-4)


@stateful_variants
def test_closing_gives_the_state_for_another_session_to_go_on_from(variant: dict[str, Any]) -> None:
    model, (first, second) = tiny(**variant), random_texts(2 * L, 2 * L)
    memories, expected_memories = (model.create_knn_memories(batch_size=1) for _ in range(2))
    expected = forced(model, first + second, expected_memories)
    state = None
    for text in (first, second):
        session = Session(model, memories, batch_size=1, segment_length=L, xl_memories=state)
        logits = session.read([text])
        state = session.close()
    torch.testing.assert_close(logits, expected.result[-1:], rtol=0, atol=1e-4)
    for memory, own in zip(memories, expected_memories, strict=True):
        torch.testing.assert_close(entries(memory, 0).keys, entries(own, 0).keys, rtol=0, atol=1e-4)


@stateful_variants
def test_generation_goes_on_from_the_state_of_the_model(variant: dict[str, Any]) -> None:
    """The text was read by the model itself, segment by segment; generation goes on after it."""
    model, (text, prompt) = tiny(**variant), random_texts(2 * L, 5)
    memories, expected_memories = (model.create_knn_memories(batch_size=1) for _ in range(2))
    state = forced(model, text, memories).state
    [new] = greedy(model, [prompt], memories, xl_memories=state)
    logits = forced(model, [*text, *prompt, *new], expected_memories).result
    assert new == logits[len(text) + len(prompt) - 1 : -1].argmax(dim=-1).tolist()


@variants
def test_uneven_prompts_in_one_batch_are_continued_as_each_alone(variant: dict[str, Any]) -> None:
    model, texts = tiny(**variant), random_texts(3, 20, 1, 8)
    memories = model.create_knn_memories(batch_size=4)
    together = greedy(model, texts, memories)
    for row, text in enumerate(texts):
        alone = model.create_knn_memories(batch_size=1)
        assert greedy(model, [text], alone) == [together[row]]
        for memory, own in zip(memories, alone, strict=True):
            assert_same_entries(entries(memory, row), entries(own, 0), tolerance=1e-4)


def test_prompts_far_beyond_the_window_fill_the_memory() -> None:
    model, texts = tiny(max_knn_memories=400), random_texts(300, 111)
    memories = model.create_knn_memories(batch_size=2)
    written = greedy(model, texts, memories, max_new_tokens=4)
    for row in range(2):
        assert entries(memories[0], row).tokens == [*texts[row], *written[row]]
        assert entries(memories[0], row).positions == list(range(len(texts[row]) + 4))


def test_what_a_memory_held_before_is_used() -> None:
    model, texts = tiny(max_knn_memories=90, num_retrieved_memories=20), random_texts(6)
    memories = model.create_knn_memories(batch_size=1)
    forced(model, random_texts(40)[0], memories)
    session = Session(model, memories, batch_size=1, segment_length=L)
    without = Session(model, None, batch_size=1, segment_length=L)
    assert not torch.allclose(session.read(texts), without.read(texts), atol=1e-3)


def test_without_memories_generation_attends_locally() -> None:
    model, texts = tiny(**EVERYTHING), random_texts(10, 18)
    written = greedy(model, texts)
    for text, new in zip(texts, written, strict=True):
        logits = forced(model, [*text, *new], None).result
        assert new == logits[len(text) - 1 : -1].argmax(dim=-1).tolist()


def test_prompts_may_be_tensors() -> None:
    model, tokens = tiny(), random_tokens(2, 9)
    assert greedy(model, tokens) == greedy(model, tokens.tolist())


@variants
def test_a_scope_of_rows_is_all_that_generation_sees(variant: dict[str, Any]) -> None:
    model, texts = tiny(**variant), random_texts(16, 9)
    memories, expected_memories = model.create_knn_memories(batch_size=4), model.create_knn_memories(batch_size=2)
    call(model, random_tokens(4, 5), memories)
    memories.clear_memory([3, 1])
    before = contents(memories)
    with memories.at_batch_indices([3, 1]):
        written = greedy(model, texts, memories)
    assert written == greedy(model, texts, expected_memories)
    after, expected = contents(memories), contents(expected_memories)
    assert_same_contents([[rows[0], rows[2]] for rows in after], [[rows[0], rows[2]] for rows in before])
    assert_same_contents([[rows[3], rows[1]] for rows in after], expected, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_generation_runs_in_any_precision(dtype: torch.dtype) -> None:
    model = tiny(**EVERYTHING, memory_dtype="bfloat16").to(dtype)
    memories = model.create_knn_memories(batch_size=2)
    written = greedy(model, random_texts(9, 3), memories)
    assert [len(new) for new in written] == [9, 9]
    assert memories[0].num_entries == (18, 12)


def test_generation_leaves_the_mode_of_the_model_alone() -> None:
    model = tiny()
    for training in (True, False):
        model.train(training)
        greedy(model, random_texts(3))
        assert model.training == training


# Sampling


def test_seeded_runs_repeat() -> None:
    model, texts = tiny(), random_texts(9, 4)

    def write(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(model, texts, max_new_tokens=12, generator=generator, segment_length=L)

    assert write(1) == write(1)
    assert write(1) != write(2)


@pytest.mark.parametrize(
    "narrow", [{"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-4}, {"temperature": 1e-40}], ids=str
)
def test_the_narrowest_sampling_is_greedy(narrow: dict[str, float]) -> None:
    model, texts = tiny(), random_texts(9, 4)
    assert greedy(model, texts, **{"temperature": 1.0, **narrow}) == greedy(model, texts)


LOGITS = torch.tensor([[2.0, 0.0, 3.0, 1.0, -4.0], [0.0, 5.0, 4.9, -9.0, 4.8]])


def frequencies(**arguments: Any) -> Tensor:
    """How often each token of either row comes up in 20,000 draws."""
    settings = {"temperature": 1.0, "top_k": None, "top_p": None, "generator": torch.Generator().manual_seed(0)}
    drawn = [sample(LOGITS[row].expand(20_000, -1), **{**settings, **arguments}) for row in range(2)]
    return torch.stack([tokens.bincount(minlength=5) / 20_000 for tokens in drawn])


def restricted(allowed: Sequence[Sequence[int]], temperature: float = 1.0) -> Tensor:
    """The distribution over these tokens only."""
    logits = torch.full_like(LOGITS, -torch.inf)
    for row, tokens in enumerate(allowed):
        logits[row, list(tokens)] = LOGITS[row, list(tokens)]
    return (logits / temperature).softmax(dim=-1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, restricted([range(5)] * 2)),
        ({"temperature": 3.0}, restricted([range(5)] * 2, temperature=3.0)),
        ({"top_k": 2}, restricted([[0, 2], [1, 2]])),
        ({"top_k": 4}, restricted([[0, 1, 2, 3], [0, 1, 2, 4]])),
        ({"top_k": 99}, restricted([range(5)] * 2)),
        ({"top_p": 1.0}, restricted([range(5)] * 2)),
        ({"top_p": 0.6}, restricted([[2], [1, 2]])),  # probabilities .64 .24 ..., and .37 .33 .30
        ({"top_p": 0.69}, restricted([[0, 2], [1, 2]])),
        ({"top_p": 0.9}, restricted([[0, 2, 3], [1, 2, 4]])),
        ({"top_k": 3, "top_p": 0.72}, restricted([[0, 2], [1, 2, 4]])),
        ({"top_k": 3, "temperature": 0.5}, restricted([[0, 2, 3], [1, 2, 4]], temperature=0.5)),
    ],
    ids=str,
)
def test_samples_follow_the_restricted_distribution(arguments: dict[str, Any], expected: Tensor) -> None:
    got = frequencies(**arguments)
    assert torch.equal(got > 0, expected > 1e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.015)


# Stopping


def test_stop_ids_end_each_row_by_itself() -> None:
    model, texts = tiny(), random_texts(9, 4, 15)
    with torch.no_grad():
        model.to_logits[1].weight.mul_(9)  # livelier texts
    free = greedy(model, texts, model.create_knn_memories(batch_size=3), max_new_tokens=20)

    def up_to(stops: set[int]) -> list[list[int]]:
        ends = [[i + 1 for i, token in enumerate(new) if token in stops] for new in free]
        return [new[: min(end, default=20)] for new, end in zip(free, ends, strict=True)]

    stops = max(({a, b} for a in free[0] for b in free[1]), key=lambda pair: len({len(new) for new in up_to(pair)}))
    memories = model.create_knn_memories(batch_size=3)
    stopped = greedy(model, texts, memories, max_new_tokens=20, stop=stops)
    assert stopped == up_to(stops)
    assert len({len(new) for new in stopped}) > 1
    for row in range(3):
        assert entries(memories[0], row).tokens == [*texts[row], *stopped[row]][-23:]


def test_a_single_stop_id_may_be_a_number_also_0() -> None:
    model, texts = tiny(), random_texts(5, 5)
    with torch.no_grad():
        model.to_logits[1].bias[0] = 1e4
    assert greedy(model, texts, stop=0) == [[0], [0]]
    assert greedy(model, texts, stop=[0]) == [[0], [0]]
    assert greedy(model, texts, stop=1) == [[0] * 9] * 2


def test_rows_that_have_ended_yield_none_in_the_stream() -> None:
    model, texts = tiny(), random_texts(9, 4)
    free = greedy(model, texts)
    stop = free[0][0] if free[0][0] not in free[1] else free[1][0]
    steps = list(stream(model, texts, max_new_tokens=9, temperature=0, stop=stop, segment_length=L))
    columns = [list(column) for column in zip(*steps, strict=True)]
    for row, column in enumerate(columns):
        count = free[row].index(stop) + 1 if stop in free[row] else 9
        assert column == [*free[row][:count], *[None] * (9 - count)][: len(steps)]
    assert None in columns[0] + columns[1]


def test_nothing_is_written_but_the_prompt_is_read_for_0_new_tokens() -> None:
    model, texts = tiny(), random_texts(9, 4)
    memories = model.create_knn_memories(batch_size=2)
    assert greedy(model, texts, memories, max_new_tokens=0) == [[], []]
    assert memories[0].num_entries == (9, 4)


# Streams


def test_a_stream_gives_what_generate_gives() -> None:
    model, texts = tiny(), random_texts(9, 4)
    steps = stream(model, texts, max_new_tokens=6, temperature=0, segment_length=L)
    assert [list(row) for row in zip(*steps, strict=True)] == greedy(model, texts, max_new_tokens=6)


def test_a_stream_reads_nothing_until_asked() -> None:
    model, texts = tiny(), random_texts(16, 4)
    memories = model.create_knn_memories(batch_size=2)
    steps = stream(model, texts, memories, max_new_tokens=6, temperature=0, segment_length=L)
    assert memories[0].num_entries == (0, 0)
    next(steps)
    assert memories[0].num_entries == (14, 0)  # its full segments


@pytest.mark.parametrize("asked", [0, 1, 5])
def test_a_stream_may_be_closed_early(asked: int) -> None:
    model, texts = tiny(**EVERYTHING, max_knn_memories=90), random_texts(16, 4)
    memories, expected_memories = (model.create_knn_memories(batch_size=2) for _ in range(2))
    steps = stream(model, texts, memories, max_new_tokens=20, temperature=0, segment_length=L)
    taken = [next(steps) for _ in range(asked)]
    steps.close()
    if asked > 0:
        assert [list(row) for row in zip(*taken, strict=True)] == greedy(
            model, texts, expected_memories, max_new_tokens=asked
        )
    assert_same_contents(contents(memories), contents(expected_memories), tolerance=1e-6)


def test_an_exception_of_the_reader_ends_the_stream_cleanly() -> None:
    model, texts = tiny(), random_texts(9)
    with pytest.raises(KeyError), model.knn_memories_context(batch_size=1) as memories:  # noqa: PT012
        for _ in stream(model, texts, memories, max_new_tokens=20, segment_length=L):
            raise KeyError


# Bad input

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": ({"prompt": []}, r"at least 1 row and 1 token each, got \[\] tokens"),
    "an empty row": ({"prompt": [[5], []]}, r"at least 1 row and 1 token each, got \[1, 0\] tokens"),
    "an empty tensor": ({"prompt": torch.zeros(2, 0, dtype=torch.int64)}, r"got \[0, 0\] tokens"),
    "a text that is not in a batch": ({"prompt": [5, 6, 7]}, "got"),
    "a tensor that is not in a batch": ({"prompt": torch.tensor([5, 6, 7])}, "got"),
    "float tokens": ({"prompt": torch.tensor([[5.5, 6.0], [7.0, 8.0]])}, "integers, got"),
    "token above the vocabulary": (
        {"prompt": [[5], [6, NUM_TOKENS]]},
        f"from 0 to {NUM_TOKENS - 1}, got 5 to {NUM_TOKENS}",
    ),
    "token below 0": ({"prompt": [[-1], [6]]}, "got -1 to 6"),
    "other number of rows": ({"prompt": [[5]]}, "memories with 1 rows in scope, got 2"),
    "too many memories": (
        {"memories": tiny(memorizing_layers=(1, 2)).create_knn_memories(batch_size=2)},
        "1 layers, got 2",
    ),
    "negative temperature": ({"temperature": -0.1}, "temperature .*got -0.1"),
    "temperature that is no number": ({"temperature": float("nan")}, "temperature .*got nan"),
    "top_k of 0": ({"top_k": 0}, "top_k to be at least 1, got 0"),
    "top_p of 0": ({"top_p": 0.0}, "top_p above 0 and at most 1, got 0"),
    "top_p above 1": ({"top_p": 1.1}, "top_p above 0 and at most 1, got 1.1"),
    "negative max_new_tokens": ({"max_new_tokens": -1}, "max_new_tokens to be at least 0, got -1"),
    "segments of no tokens": ({"segment_length": 0}, "segment_length to be at least 1, got 0"),
    "state of another model": ({"xl_memories": tiny(xl_max_memories=3).initial_state(2)}, r"\(0, 0\), got \(3, 0\)"),
    "state that is only a list": ({"xl_memories": []}, "got list"),
}


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_read(name: str, function: Any) -> None:
    model, (changes, match) = tiny(), BAD[name]
    memories = model.create_knn_memories(batch_size=2)
    arguments = {"prompt": random_texts(16, 3), "memories": memories, "max_new_tokens": 3, "segment_length": L}
    with refused(rf"expected .*{match}"):
        function(model, **{**arguments, **changes})
    assert memories[0].num_entries == (0, 0)


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        ([[5]], "expected 2 texts, got 1"),
        ([[5], [NUM_TOKENS]], f"from 0 to {NUM_TOKENS - 1}, got"),
        ([[5], [-2]], "got -2"),
    ],
    ids=str,
)
def test_a_session_goes_on_after_what_it_refused(texts: list[list[int]], match: str) -> None:
    model, good = tiny(), random_texts(9, 4)
    sessions = [
        Session(model, model.create_knn_memories(batch_size=2), batch_size=2, segment_length=L) for _ in range(2)
    ]
    for session in sessions:
        session.read(good)
    with refused(match):
        sessions[0].read(texts)
    assert torch.equal(*(session.read(good) for session in sessions))


def test_a_session_begins_with_logits_of_0_and_reading_nothing_keeps_them() -> None:
    session = Session(tiny(), None, batch_size=2, segment_length=L)
    assert not session.logits.any()
    assert not session.read([[], []]).any()
    assert session.read([[5], []])[0].any()
    assert not session.logits[1].any()


def test_logits_that_were_returned_do_not_change_later() -> None:
    model = tiny()
    session = Session(model, None, batch_size=1, segment_length=7)
    first = session.read([[5]])
    kept = first.clone()
    session.read([[6]])
    assert torch.equal(first, kept)


def test_a_stream_closed_after_its_memories_does_not_touch_them() -> None:
    model = tiny()
    with model.knn_memories_context(batch_size=1) as memories:
        steps = stream(model, [[5, 6]], memories, max_new_tokens=9, segment_length=7)
        next(steps)
    steps.close()


def test_an_error_while_writing_is_the_error_that_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    with model.knn_memories_context(batch_size=1) as memories:
        steps = stream(model, [[5, 6]], memories, max_new_tokens=9, segment_length=7)
        next(steps)

        def fail(*args: Any) -> Any:
            raise RuntimeError("out of memory")

        monkeypatch.setattr(model, "run_layers", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            next(steps)
        assert memories[0].num_entries == (0,)
