"""The page of the explorer, with Gradio: what is on it, and what its buttons do."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

# Gradio sends usage data to its makers unless this is set before it is imported.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from memorizing_transformers_pytorch.explorer.explanation import Explanation
from memorizing_transformers_pytorch.explorer.markup import part, shown, visible
from memorizing_transformers_pytorch.explorer.service import MAX_BYTES, Service
from memorizing_transformers_pytorch.explorer.workspace import Sampling

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # accepted host names: another site may point its own name here (DNS rebinding)
PORTS = 100  # that are tried
MAX_UPLOAD = 50 * MAX_BYTES  # beyond it the browser refuses all chosen files; below, we refuse only the large ones
DELAY = 0.1  # seconds
ALL = -1  # layers or heads
TITLE = "Memory explorer"
ASKS: dict[str, Any] = {"api_visibility": "private", "concurrency_id": "model", "concurrency_limit": 1}


class Page:
    """The parts of the page. Texts of files and models reach it through `shown` only."""

    def __init__(self, service: Service, name: str) -> None:
        self._service = service
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 600)) as self.blocks:
            gr.HTML(shown.title(TITLE, name), padding=False)
            with gr.Row(elem_classes="mt-columns"):
                with gr.Column(scale=2, min_width=320):
                    self._memory()
                with gr.Column(scale=3, min_width=320):
                    self._question()
            self.session = gr.HTML("", html_template="", js_on_load=part("app.js"), visible="hidden")
            self._wire()

    def _memory(self) -> None:
        gr.HTML("<h2>Memory</h2>")
        changes = not self._service.read_only
        with gr.Group(visible=changes):
            self.files = gr.File(label="Read text files", file_count="multiple", height=140, elem_id="files")
            with gr.Accordion("Or paste a text", open=False):
                self.name = gr.Textbox("pasted text", label="Title", max_lines=1, elem_id="paste-title")
                self.pasted = gr.Textbox(label="Text", lines=4, max_lines=12, elem_id="paste-text")
                self.paste = gr.Button("Read this text", elem_id="paste")
        self.told = gr.HTML(elem_id="told")
        self.documents = gr.HTML(elem_id="documents")
        with gr.Group(visible=changes):
            self.chosen = gr.Dropdown([], label="Documents to forget", multiselect=True, elem_id="chosen")
            self.forget = gr.Button("Forget", elem_id="forget")
        with gr.Group(visible=changes):
            self.folder = gr.Textbox(label="Folder to save the memory to", max_lines=1, elem_id="folder")
            self.save = gr.Button("Save to this folder", elem_id="save")

    def _question(self) -> None:
        gr.HTML("<h2>Question</h2>")
        asks = self._service.finds_passages
        label = "Question, or a text to be continued" if asks else "Prompt, to be continued"
        self.prompt = gr.Textbox(label=label, lines=3, max_lines=12, elem_id="prompt")
        self.question = gr.Checkbox(asks, label="Answer it as a question", visible=asks, elem_id="question")
        with gr.Accordion("How to continue", open=False):
            self.count = gr.Slider(1, 400, 40, step=1, label="Tokens to write")
            self.temperature = gr.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest token)")
            self.seed = gr.Number(0, label="Seed", precision=0)
            self.measure = gr.Checkbox(
                False, label="Measure what each passage is worth (slower: one run for each)", elem_id="measure"
            )
        self.ask = gr.Button("Ask" if asks else "Continue", variant="primary", elem_id="ask")
        self.failed = gr.HTML(elem_id="failed")
        with gr.Row():
            with gr.Column(min_width=280):
                gr.HTML("<h3>With the memory</h3>")
                self.with_memory = gr.HTML(elem_id="with")
            with gr.Column(min_width=280):
                gr.HTML("<h3>Without the memory</h3>")
                self.without = gr.HTML(elem_id="without")
        gr.HTML("<h2>What was looked up</h2>")
        with gr.Row():
            self.layer = gr.Dropdown([("all layers", ALL)], value=ALL, label="Layer", elem_id="layer")
            self.head = gr.Dropdown([("all heads", ALL)], value=ALL, label="Head", elem_id="head")
        self.tokens = gr.HTML(elem_id="tokens")
        self.sources = gr.HTML(elem_id="sources")

    def _wire(self) -> None:
        table = [self.documents, self.chosen]
        after_change = [self.told, *table, self.tokens, self.sources]
        written = [self.failed, self.with_memory, self.without]
        answer = [*written, self.layer, self.head, self.tokens, self.sources]
        self.blocks.load(self._on_load, None, [self.session, *table], **ASKS)
        asked = [self.prompt, self.count, self.temperature, self.seed, self.measure, self.question]
        self.ask.click(self._on_ask, asked, answer, **ASKS)
        chosen = [self.layer, self.head]
        for each in chosen:
            each.input(self._on_choice, chosen, [self.tokens, self.sources], **ASKS)
        if self._service.read_only:
            return  # nor can anybody call it
        self.files.upload(self._on_files, [self.files], [self.told, *table, self.files], **ASKS)
        self.paste.click(self._on_paste, [self.name, self.pasted], [self.told, *table, self.pasted], **ASKS)
        self.forget.click(self._on_forget, [self.chosen], after_change, **ASKS)
        self.save.click(self._on_save, [self.folder], [self.told], **ASKS)

    def _table(self, session: str) -> list[Any]:
        found = self._service.documents(session)
        choices = [(f"{each.number}: {visible(each.title, 80)}", each.number) for each in found]
        return [shown.documents(found), gr.update(choices=choices, value=[])]

    def _on_load(self, request: gr.Request) -> list[Any]:
        return [_session(request), *self._table(_session(request))]

    def _on_files(self, files: Sequence[str] | None, request: gr.Request, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008 (Gradio wants it so)
        told, count = "", len(files or ())
        for i, path in enumerate(map(Path, files or ())):
            try:
                size = path.stat().st_size
                if size > MAX_BYTES:
                    raise ValueError(f"expected at most {MAX_BYTES:,} bytes in {path.name!r}, got {size:,}")
                tell = partial(_tell, progress, i, count)
                said = self._service.read(_session(request), path.name, path.read_bytes(), tell)
                told += shown.message(said)
            except (ValueError, OSError) as error:
                told += shown.message(str(error), is_bad=True)
            finally:
                path.unlink(missing_ok=True)  # Gradio's copy
        return [told, *self._table(_session(request)), None]

    def _on_paste(self, name: str, text: str, request: gr.Request, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        session, data = _session(request), text.encode("utf-8", "surrogatepass")
        told = _tried(lambda: self._service.read(session, name, data, partial(_tell, progress, 0, 1)))
        return [told, *self._table(session), text if "mt-alert" in told else ""]

    def _on_forget(self, numbers: list[int], request: gr.Request) -> list[Any]:
        session = _session(request)
        told = _tried(lambda: f"Forgotten: {self._service.forget(session, numbers)} documents.")
        return [told, *self._table(session), *self._views(self._service.answer(session))]

    def _on_save(self, folder: str, request: gr.Request) -> str:
        return _tried(lambda: f"Saved to {self._service.save(_session(request), folder)}")

    def _on_ask(
        self,
        prompt: str,
        count: int,
        temperature: float,
        seed: int,
        measure: bool,
        is_question: bool,
        request: gr.Request,
    ) -> list[Any]:
        try:
            sampling = Sampling(int(count), float(temperature), int(seed or 0))
            answer = self._service.ask(_session(request), prompt, sampling, measure=measure, is_question=is_question)
        except (ValueError, OSError) as error:
            return [shown.message(str(error), is_bad=True), *(gr.skip() for _ in range(6))]
        found = answer.found
        layers = [("all layers", ALL), *((f"layer {number}", number) for number in found.layers)]
        heads = [("all heads", ALL), *((f"head {number}", number) for number in range(found.mass.shape[1]))]
        given = f"{prompt}\n" if is_question else prompt
        return [
            "",
            shown.written(given, answer.with_memory),
            shown.written(given, answer.without_memory),
            gr.update(choices=layers, value=ALL),
            gr.update(choices=heads, value=ALL),
            *self._views(found),
        ]

    def _on_choice(self, layer: int, head: int, request: gr.Request) -> list[str]:
        chosen = (None if each == ALL else each for each in (layer, head))
        return self._views(self._service.answer(_session(request), *chosen))

    def _views(self, found: Explanation | None) -> list[str]:
        return ["", ""] if found is None else [shown.tokens(found), shown.sources(found)]


def _tried(action: Callable[[], str]) -> str:
    """What an action says, or what was wrong."""
    try:
        return str(shown.message(action()))
    except (ValueError, OSError) as error:
        return str(shown.message(str(error), is_bad=True))


def _tell(progress: Any, number: int, count: int, part: float) -> None:
    """Show how much of a text, and of all texts, has been read."""
    progress((number + part) / count, desc=f"reading {number + 1} of {count}")


def _session(request: gr.Request) -> str:
    return str(request.session_hash)


class DelayedJoins:
    """ASGI middleware around Gradio, which confirms each new question a moment later.

    A tab hears its answers on one stream, which the server closes after the last. If it hears that a new question is
    accepted before it hears of the close, it takes the old stream for that of the new question, and waits for ever.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def later(message: Any) -> None:
            if message["type"] == "http.response.start":
                await asyncio.sleep(DELAY)
            await send(message)

        is_join = str(scope.get("path", "")).rstrip("/").endswith("/queue/join")
        await self._app(scope, receive, later if is_join else send)


def launch(service: Service, name: str, wanted: int) -> tuple[gr.Blocks, str]:
    """Show the page on this machine alone, at this port or the next free one -> the page, and its address."""
    for port in range(wanted, min(wanted + PORTS, 65_536)):
        blocks = Page(service, name).blocks
        with suppress(OSError):  # the port is taken
            app = _launched(blocks, port)
            app.add_api_route("/closed/{session}", service.let_go, methods=["POST"], status_code=204)
            if _is_own(blocks, port):
                return blocks, f"http://{HOST}:{port}"
        blocks.close(verbose=False)
    raise ValueError(f"none of the {PORTS} ports from {wanted} on is free: choose another --port")


def _launched(blocks: gr.Blocks, port: int) -> Any:
    app, *_ = blocks.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        app_kwargs={"middleware": [Middleware(TrustedHostMiddleware, allowed_hosts=NAMES), Middleware(DelayedJoins)]},
        theme=_theme(),
        css=part("app.css"),
        prevent_thread_lock=True,
    )
    return app


def _theme() -> gr.themes.Base:
    """The fonts of the system, and no text too pale to read (WCAG 2, AA)."""
    theme = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return theme.set(
        body_text_color_subdued="*neutral_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


def _is_own(blocks: gr.Blocks, port: int) -> bool:
    """Whether what answers there is this page; of two programs that begin together, both may think so."""
    connection = http.client.HTTPConnection(HOST, port, timeout=30)
    try:
        connection.request("GET", "/gradio_api/app_id")
        return bool(json.loads(connection.getresponse().read())["app_id"] == blocks.app_id)
    except (http.client.HTTPException, KeyError, ValueError):
        return False
    finally:
        connection.close()
