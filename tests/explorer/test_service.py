"""What the explorer does, with a model of a run and with one of transformers, and how it shows hostile texts."""

from __future__ import annotations

import gc
import http.client
import socket
import threading
from pathlib import Path

import pytest

from memorizing_transformers_pytorch.explorer import service as explorer_service
from memorizing_transformers_pytorch.explorer.markup import shown, visible
from memorizing_transformers_pytorch.explorer.service import Service
from memorizing_transformers_pytorch.explorer.workspace import Sampling
from memorizing_transformers_pytorch.library.readers import open_reader
from memorizing_transformers_pytorch.memory import KNNMemoryList
from tests.library.conftest import make_hub_model, make_run
from tests.memory.test_disk import same

FEW = Sampling(new_tokens=8)
TEXT = b"the whale was white and the sea was wide. " * 3
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\u202egnp.exe\0\x1b[31m" + "x" * 50_000


@pytest.fixture(params=["run", "hub"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str((make_run if request.param == "run" else make_hub_model)(tmp_path / "model"))


def serving(model: str, memory: Path | None = None, **options: bool) -> Service:
    return Service(open_reader(model, "cpu", max_memories=None, dtype=None, index=None), memory, **options)


def titles(service: Service, session: str) -> list[str]:
    return [each.title for each in service.documents(session)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_read_is_looked_up_until_it_is_forgotten(model: str) -> None:
    service, parts = serving(model), list[float]()
    assert "Read whale.txt" in service.read("me", "whale.txt", TEXT, parts.append)
    assert parts == sorted(parts)
    assert parts[-1] == 1
    answer = service.ask("me", "the whale", FEW, measure=True)
    assert len(answer.found.texts) == len("the whale") + 8
    assert {each.title for each in answer.found.passages} == {"whale.txt"}
    assert any(each.contribution is not None for each in answer.found.passages)
    assert "".join(each.text for each in answer.found.passages if each.first == 32).startswith(TEXT.decode()[32:50])
    assert answer.found.mass.max() > 0
    number = service.documents("me")[0].number
    assert service.forget("me", [number]) == 1
    assert titles(service, "me") == []
    assert service.answer("me") is None
    after = service.ask("me", "the whale", FEW)
    assert len(after.found) == 0
    assert after.with_memory == after.without_memory == answer.without_memory


def test_a_title_stays_as_it_was_given(model: str) -> None:
    service = serving(model)
    for title, text in ((" TCP/IP, part 1/2 ", b"one"), ("a\\b", b"two"), (" ", b"three")):
        service.read("me", title, text * 20)
    assert titles(service, "me") == ["TCP/IP, part 1/2", "a\\b", "text"]


def test_asking_is_not_remembered_and_the_same_seed_writes_the_same(model: str) -> None:
    service = serving(model)
    service.read("me", "a", TEXT)
    before, warm = service.documents("me").to_dicts(), Sampling(12, 1.0, seed=3)
    first, again = (service.ask("me", "sea", warm) for _ in range(2))
    other = service.ask("me", "sea", Sampling(12, 1.0, seed=4))
    assert (first.with_memory, first.without_memory) == (again.with_memory, again.without_memory)
    assert first.with_memory != other.with_memory
    assert service.documents("me").to_dicts() == before


def test_sessions_do_not_mix_and_are_let_go(model: str) -> None:
    service = serving(model)
    service.read("one", "one.txt", TEXT)
    service.read("two", "two.txt", b"call me ishmael, some years ago " * 3)
    assert [titles(service, name) for name in ("one", "two", "three")] == [["one.txt"], ["two.txt"], []]
    for name in ("one", "two", "one"):
        assert {each.title for each in service.ask(name, "the sea", FEW).found.passages} == {f"{name}.txt"}
    service.forget("one", [service.documents("one")[0].number])
    assert titles(service, "two") == ["two.txt"]
    service.let_go("two")
    service.let_go("never there")
    assert sorted(service.sessions) == ["one", "three"]
    assert titles(service, "two") == []


def test_sessions_at_the_same_time_get_what_they_get_one_after_the_other(model: str) -> None:
    service, found = serving(model), dict[int, str]()

    def use(i: int) -> None:
        for n in range(3):
            service.read(str(i), f"{i}-{n}", f"text {i} {n} of several. ".encode() * 4)
        found[i] = service.ask(str(i), "text", FEW).with_memory

    threads = [threading.Thread(target=use, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert [titles(service, str(i)) for i in range(4)] == [[f"{i}-{n}" for n in range(3)] for i in range(4)]
    assert [service.ask(str(i), "text", FEW).with_memory for i in range(4)] == [found[i] for i in range(4)]


def test_a_folder_stays_as_it_is_until_it_is_saved(model: str, tmp_path: Path) -> None:
    first, folder = serving(model), tmp_path / "memory"
    first.read("me", "one.txt", TEXT)
    assert first.save("me", f" {folder} ") == str(folder)
    before = contents(folder)
    service = serving(model, folder)
    service.read("a", "two.txt", b"call me ishmael " * 5)
    service.forget("a", [service.documents("a")[0].number])
    service.ask("a", "the whale", FEW)
    assert (titles(service, "a"), titles(service, "b")) == (["two.txt"], ["one.txt"])
    assert contents(folder) == before
    service.save("a", str(tmp_path / "other"))
    assert contents(folder) == before
    assert [each.title for each in KNNMemoryList.load(tmp_path / "other").documents()] == ["two.txt"]
    service.save("a", str(tmp_path / "other"))  # again, after others have used the model
    assert same(KNNMemoryList.load(tmp_path / "other"), KNNMemoryList.load(tmp_path / "other"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("{}")
    for wrong in ("", str(tmp_path / "mine")):
        with pytest.raises(ValueError, match="expected"):
            service.save("a", wrong)


def test_a_memory_is_not_saved_among_other_things(model: str) -> None:
    """Such as into the folder of its own model."""
    service = serving(model)
    service.read("me", "one.txt", TEXT)
    before = sorted(Path(model).rglob("*"))
    with pytest.raises(ValueError, match="expected a new folder, an empty one or that of a memory"):
        service.save("me", model)
    assert sorted(Path(model).rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("b.bin", b"\x89PNG\0\0", "b.bin: binary file"),
        ("e.txt", b" \n", "e.txt: empty file"),
        ("l.txt", "Où".encode("latin-1"), "l.txt: not UTF-8, byte 0xf9 at offset 1"),
        ("h.txt", b"x" * 2_001, "expected at most 2,000 bytes in 'h.txt', got 2,001"),
        ("again.txt", TEXT, "already in the memory, as 'whale.txt'"),
    ],
)
def test_bad_texts_are_refused_and_nothing_is_lost(
    model: str, name: str, data: bytes, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serving(model)
    service.read("me", "whale.txt", TEXT)
    before = service.documents("me").to_dicts()
    monkeypatch.setattr(explorer_service, "MAX_BYTES", 2_000)
    with pytest.raises(ValueError, match=message):
        service.read("me", name, data)
    assert service.documents("me").to_dicts() == before


def test_reading_that_is_broken_off_leaves_the_memory_as_it_was(model: str) -> None:
    service = serving(model)
    service.read("me", "whale.txt", TEXT)

    def fail(_part: float) -> None:
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        service.read("me", "long.txt", b"a long text " * 300, fail)
    with pytest.raises(ValueError, match="the session is closed"):
        service.read("me", "long.txt", b"a long text " * 300, lambda _: service.let_go("me"))
    service.read("other", "whale.txt", TEXT)
    assert titles(service, "other") == ["whale.txt"]


def test_a_session_that_was_let_go_leaves_nothing_behind_whatever_it_still_asked_for(model: str) -> None:
    service = serving(model)
    with pytest.raises(ValueError, match="the session is closed"):
        service.read("me", "whale.txt", TEXT, lambda _: service.let_go("me"))
    assert service.sessions == []
    assert titles(service, "me") == []
    service.ask("me", "the whale", FEW)
    assert service.sessions == []


def test_bad_questions_are_refused(model: str) -> None:
    service = serving(model)
    for prompt, message in (("", "expected a prompt"), ("x" * 5_000, "tokens of prompt and continuation")):
        with pytest.raises(ValueError, match=message):
            service.ask("me", prompt, FEW)
    for bad in ({"new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match="at least 1 token"):
            Sampling(**bad)
    for numbers in ([], [7]):
        with pytest.raises(ValueError, match="expected documents of the memory"):
            service.forget("me", numbers)


def test_read_only_changes_nothing(model: str, tmp_path: Path) -> None:
    writer, folder = serving(model), tmp_path / "memory"
    writer.read("me", "one.txt", TEXT)
    writer.save("me", str(folder))
    service = serving(model, folder, read_only=True)
    for act in (
        lambda: service.read("me", "x", TEXT),
        lambda: service.forget("me", [0]),
        lambda: service.save("me", str(tmp_path / "y")),
    ):
        with pytest.raises(ValueError, match="--read-only"):
            act()
    assert len(service.ask("me", "the whale", FEW).found) > 0
    assert not (tmp_path / "y").exists()


def test_layers_and_heads_are_parts_of_the_whole(model: str) -> None:
    service = serving(model)
    service.read("me", "one.txt", TEXT)
    whole = service.ask("me", "the whale", FEW, measure=True).found
    layer = whole.layers[0]
    parts = [service.answer("me", layer, head) for head in range(whole.mass.shape[1])]
    one = service.answer("me", layer)
    assert one is not None
    assert all(part is not None for part in parts)
    assert sum(map(len, filter(None, parts))) == len(one)
    assert one.layers == [layer]
    assert set(one.columns["layer"].tolist()) == {layer}
    assert sum(each.weight for each in one.passages) == pytest.approx(one.mass_of_tokens().sum(), rel=1e-4)
    assert {each.contribution for each in one.passages} <= {each.contribution for each in whole.passages}
    assert service.answer("me", layer, 99) is not None


def test_hostile_texts_are_shown_and_not_obeyed(model: str) -> None:
    service = serving(model)
    service.read("me", f"{HOSTILE[:60]}.txt", HOSTILE.replace("\0", "").encode()[:3_000])
    found = service.ask("me", "<b>x", FEW).found
    pages = [
        shown.documents(service.documents("me")),
        shown.sources(found),
        shown.tokens(found),
        shown.written("<b>x", HOSTILE),
        shown.message(HOSTILE),
    ]
    for page in pages:
        assert not any(bad in page.lower() for bad in ("<script", "<img", "<b>", "\u202e", "\0", "\x1b"))
        assert len(page) < 100_000
    assert "&lt;script&gt;" in pages[3]
    assert "⟨U+202E⟩" in visible(HOSTILE)
    assert "⟨U+0000⟩" in visible(HOSTILE)
    assert visible("a\tb\r\nc é 漢", 100) == "a\tb\nc é 漢"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_taken_port_gives_way_to_the_next(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from memorizing_transformers_pytorch.explorer.app import HOST, launch

    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        blocks, address = launch(serving(str(make_run(tmp_path / "run"))), "a run", port)
        blocks.close(verbose=False)
        gc.collect()
    assert port < int(address.rsplit(":", 1)[1]) <= port + 100


def _status(host: str, port: int, method: str, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, b"{}", {"Host": host, "Origin": f"http://{host}"})
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_who_asks_for_another_name_than_that_of_this_machine_gets_nothing(tmp_path: Path) -> None:
    """A page of somebody else can have its own name lead to 127.0.0.1, and would then be of the same origin."""
    pytest.importorskip("gradio")
    from memorizing_transformers_pytorch.explorer.app import launch

    service = serving(str(make_run(tmp_path / "run")))
    service.read("me", "whale.txt", TEXT)
    blocks, address = launch(service, "a run", 7_960)
    port = int(address.rsplit(":", 1)[1])
    try:
        for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1.evil.example:{port}", "127.0.0.2"):
            assert _status(host, port, "GET", "/") == 400
            assert _status(host, port, "POST", "/gradio_api/queue/join") == 400
            assert _status(host, port, "POST", "/closed/me") == 400
        assert service.sessions == ["me"]
        for host in (f"127.0.0.1:{port}", f"localhost:{port}"):
            assert _status(host, port, "GET", "/") == 200
        assert _status(f"localhost:{port}", port, "POST", "/closed/me") == 204
        assert service.sessions == []
    finally:
        blocks.close(verbose=False)
        del blocks
        gc.collect()


@pytest.mark.parametrize("content", ["kv", "tokens"])
def test_a_memory_of_passages_answers_questions_and_shows_what_stood_before_the_answer(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is forgotten; and again from the folder where it was saved."""
    attach_spans = pytest.importorskip("memorizing_transformers_pytorch.huggingface.attach_spans")
    monkeypatch.setattr(attach_spans, "best_head", lambda *_: attach_spans.Head(0, 0, 1.0))
    model, folder = str(make_hub_model(tmp_path / "model")), tmp_path / "saved"
    spans = {"content": content, "span": 24, "passages": 2}
    reader = open_reader(model, "cpu", max_memories=None, dtype=None, index=None, spans=spans)
    service = Service(reader)
    assert service.finds_passages
    service.read("me", "whale.txt", TEXT)
    service.read("me", "vault.txt", b"The password is seven green apples, and nobody knows it. " * 2)
    service.save("me", str(folder))
    first = service.ask("me", "What is it?", FEW, measure=True, is_question=True)
    assert first.prompt == "What is it?"
    alone = open_reader(model, "cpu", max_memories=None, dtype=None, index=None, spans=spans)
    alone.load(folder)
    assert alone.memory.ask("What is it?", max_new_tokens=FEW.new_tokens).text == first.with_memory.strip()  # type: ignore[union-attr]
    assert first.found.blocks is not None
    assert {each.title for each in first.found.passages} <= {"whale.txt", "vault.txt"}
    assert all(each.contribution is not None for each in first.found.passages)
    html = str(shown.sources(first.found))
    assert "Before tokens" in html
    assert "--mass: 1.000" in html
    part = service.answer("me", layer=1, head=0)
    assert part is not None
    assert {(p.first, p.contribution) for p in part.passages} == {
        (p.first, p.contribution) for p in first.found.passages
    }
    continued = service.ask("me", "the whale", FEW)
    assert len(continued.found.texts) == len("the whale") + 8
    for each in service.documents("me"):
        service.forget("me", [each.number])
    empty = service.ask("me", "What is it?", FEW, is_question=True)
    assert empty.found.passages == []
    assert empty.with_memory == empty.without_memory == first.without_memory
    before = contents(folder)
    again = Service(reader, folder).ask("you", "What is it?", FEW, is_question=True)
    assert again.with_memory == first.with_memory
    assert contents(folder) == before
    with pytest.raises(ValueError, match="got an empty one"):
        service.ask("me", " ", FEW, is_question=True)
    of_tokens = Service(open_reader(model, "cpu", max_memories=None, dtype=None, index=None))
    with pytest.raises(ValueError, match="only a memory of passages can be asked"):
        of_tokens.ask("me", "What is it?", FEW, is_question=True)
