"""The page of the playground, by gradio: controls, the answer, and what can be copied.

The page is for the machine it runs on. It fetches nothing from elsewhere, and its visitors name no
files.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

from erk_guid.common.errors import ErkGuidError, printable
from erk_guid.play.choice import (
    GATES,
    GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    PUBLISHED,
    Choice,
)
from erk_guid.play.copying import as_command_line, as_python
from erk_guid.play.session import Session
from erk_guid.play.showing import STYLE, about_distance, error, panels, trace_picture
from erk_guid.schedules import SCHEDULES
from erk_guid.solvers import SOLVERS

HOST = "127.0.0.1"
TITLE = "ERK-Guid playground"
RANDOM = "one for each seed"
UNBOUNDED = 0.0
"""Where the slider of the bound stands for none: a bound of 0 would leave nothing of guidance."""
BEFORE = "<p>Choose, then press <em>Make the images</em>.</p>"
COPY = "(text) => { navigator.clipboard.writeText(text); }"
# Text, pictures and programs from this server alone; gradio's own page has the last two inline.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; worker-src 'self' blob:; "
    "font-src 'self' data:; connect-src 'self' ws: data: blob:"
)


def serve(session: Session, start: Choice, port: int, open_page: bool) -> None:
    """Serve the page until a signal ends the program.

    Args:
        session: the networks.
        start: what the controls show at first.
        port: on this machine.
        open_page: open it in the usual browser.

    Raises:
        ErkGuidError: the port is taken.
    """
    blocks = make_page(session, start)
    import gradio

    try:
        blocks.launch(
            server_name=HOST, server_port=port, share=False, inbrowser=open_page,
            prevent_thread_lock=True, quiet=True, footer_links=[], ssr_mode=False,
            enable_monitoring=False, mcp_server=False, max_file_size=1, css=STYLE,
            theme=gradio.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            app_kwargs={"middleware": _middleware()},
        )  # fmt: skip
    except OSError as problem:
        raise ErkGuidError(
            f"cannot serve the page at {HOST}:{port}, the port may be taken; give another --port"
        ) from problem
    try:
        print(f"The playground is at http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(3600)
    finally:
        blocks.close(verbose=False)


def make_page(session: Session, start: Choice) -> Any:
    """Return the page, a `gradio.Blocks`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
    import gradio as gr

    with gr.Blocks(title=TITLE, analytics_enabled=False) as blocks:
        gr.Markdown(f"# {TITLE}\n{_named(session)}")
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                button = gr.Button("Make the images", variant="primary", elem_id="make")
                controls = _controls(gr, session, start)
            with gr.Column(scale=3, min_width=340):
                images = gr.HTML(BEFORE, elem_id="answer")
                gr.Markdown(about_distance(session))
                gr.Markdown("### What guidance saw and did")
                trace = gr.HTML(elem_id="trace")
                copies = [_copied(gr, what) for what in ("command line", "Python")]

        def answered(*values: Any) -> Iterator[tuple[str, str, str, str]]:
            yield from respond(session, list(controls), values)

        button.click(
            answered,
            inputs=list(controls.values()),
            outputs=[images, trace, *copies],
            show_progress="minimal",
            api_visibility="private",
        )
    return blocks


def respond(
    session: Session, names: Sequence[str], values: Sequence[Any]
) -> Iterator[tuple[str, str, str, str]]:
    """Yield what the page shows: the columns, the trace, the command line, the program.

    Each time more of it is there. A mistake of the visitor is shown in place of the columns.

    Args:
        session: the networks.
        names: fields of `Choice`.
        values: what the controls say, in the order of `names`.
    """
    try:
        choice = choice_of(dict(zip(names, values, strict=True)))
        shown = ("", "", "", "")
        for answer in session.answer(choice):
            run = answer.chosen
            copied = as_command_line(run, session.network), as_python(run)
            shown = (panels(answer), "", *copied)
            yield shown
        yield (shown[0], trace_picture(run), *shown[2:])
    except ErkGuidError as problem:
        yield (error(printable(problem, 1000)), "", "", "")


def choice_of(values: dict[str, Any]) -> Choice:
    """Return the choice that the controls' values are.

    Raises:
        ErkGuidError: see `Choice`.
    """
    said = dict(values)
    for name in ("steps", "first_seed", "count"):
        # A slider gives whole numbers as either kind.
        if isinstance(said[name], float) and said[name].is_integer():
            said[name] = int(said[name])
    if said["bound"] == UNBOUNDED:
        said["bound"] = None
    if said["class_idx"] == RANDOM:
        said["class_idx"] = None
    return Choice(**said)


def _middleware() -> list[Any]:
    """Return what answers this machine's browser alone, and keeps it from asking others."""
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    # A page from elsewhere whose name was made to point at this machine would be let in.
    hosts = [HOST, "localhost"]
    return [
        Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
        Middleware(_Header, policy=POLICY),
    ]


class _Header:
    """Adds the policy to every answer (ASGI)."""

    def __init__(self, app: Any, policy: str) -> None:
        self._app = app
        self._header = (b"content-security-policy", policy.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def adding(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", []), self._header]}
            await send(message)

        await self._app(scope, receive, adding)


def _named(session: Session) -> str:
    """Return which networks are shown."""
    models = session.models
    with_guide = f", guided by `{models.guide.source}`" if models.guide else ""
    return (
        f"`{models.loaded.source}`{with_guide}, on {models.device}. The same seeds three times: by "
        "plain Heun with as many network evaluations, by your choice, and by a fine solution."
    )


def _controls(gr: Any, session: Session, start: Choice) -> dict[str, Any]:
    """Make the controls; their names are the fields of `Choice`."""
    fits = list(session.fits)
    controls = {
        "solver": gr.Dropdown(sorted(SOLVERS), value=start.solver, label="Solver"),
        "steps": gr.Slider(3, MOST_STEPS, start.steps, step=1, label="Steps (noise levels)"),
        "schedule": gr.Radio(
            [*SCHEDULES, *fits], value=start.schedule, label="Spacing of the noise levels",
            info="polynomial is EDM's" + ("; a fit also sets solver and guidance" if fits else ""),
        ),
        "form": gr.Radio(list(GUIDANCE), value=start.form, label="ERK guidance"),
    }  # fmt: skip
    with gr.Group(visible=start.form == PUBLISHED) as published:
        controls |= {
            "w_stiff": gr.Slider(0, 3, start.w_stiff, step=0.05, label="w_stiff, the strength"),
            "w_con": gr.Slider(0, 3, start.w_con, step=0.05, label="w_con, the gate's threshold"),
            "gate": gr.Radio(list(GATES), value=start.gate, label="What the gate compares"),
            "bound": gr.Slider(
                0, 1, start.bound or UNBOUNDED, step=0.05, label="Bound (0: no limit)"
            ),
        }
    controls["strength"] = gr.Slider(
        min(0, start.strength), max(5, start.strength), start.strength, step=0.1,
        visible=session.guided, label="Strength of model guidance (1: off)",
    )  # fmt: skip
    controls["eta"] = gr.Slider(
        0, 1, start.eta, step=0.05, label="eta, noise in the steps (0: none)"
    )
    classes = [RANDOM, *range(session.classes)]
    controls |= {
        "class_idx": gr.Dropdown(
            classes, value=RANDOM, label="Class", visible=session.classes > 0
        ),
        "first_seed": gr.Number(start.first_seed, precision=0, label="First seed"),
        "count": gr.Slider(1, MOST_IMAGES, start.count, step=1, label="Number of images"),
    }  # fmt: skip
    quiet = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
    for control in controls.values():
        if isinstance(control, (gr.Slider, gr.Number)):
            # gradio ends in a traceback where a box was emptied; `Choice` says what is wrong.
            control.preprocess = _as_it_is
    form, schedule = controls["form"], controls["schedule"]

    def settled(schedule: str, form: str) -> list[Any]:
        free = schedule not in fits
        others = [gr.update(interactive=free) for _ in SET_BY_FIT]
        return [*others, gr.update(visible=free and form == PUBLISHED)]

    for control in (form, schedule):
        control.change(
            settled, [schedule, form], [*(controls[n] for n in SET_BY_FIT), published], **quiet
        )
    return controls


def _as_it_is(payload: Any) -> Any:
    return payload


SET_BY_FIT = ("solver", "form", "eta")
"""Controls that a fit decides about."""


def _copied(gr: Any, what: str) -> Any:
    """Make a text that a button copies."""
    key = what.split()[0].lower()
    text = gr.Code(
        language="python" if key == "python" else "shell", label=f"As {what}", lines=1,
        interactive=False, wrap_lines=True, elem_id=f"text-{key}",
    )  # fmt: skip
    gr.Button(f"Copy as {what}", size="sm", elem_id=f"copy-{key}").click(
        None, inputs=[text], js=COPY, api_visibility="private"
    )
    return text
