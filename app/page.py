"""The page's layout: three columns of Gradio blocks, and which control calls what. No state lives here.

Conversations, messages, settings and the panel are own elements (assets/ui): a conversation of 400 messages must stay
light, and a value that travels through Gradio's queue does not say whose it is. Gradio's are page, theme, tabs and
what is set of the engine; there is no gr.State and with it no heartbeat connection for each tab.
"""
from __future__ import annotations

import math

import gradio as gr

from app.strings import TEXT
from engine import LEVELS, UserError

HEAD = ('<meta name="viewport" content="width=device-width, initial-scale=1">'
        + "".join(f'<link rel="stylesheet" href="/ui/styles/{name}.css">' for name in ("style", "code", "models")))
FONTS = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # the system's own: nothing is fetched
_MIB = 1 << 20
FASTER = 1.05  # a plan is no more exact than that
# always_last: Gradio's own choice drops what a person does while the same event's last answer is still under way
FREE = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}


def theme() -> gr.themes.Base:
    return gr.themes.Base(primary_hue="teal", neutral_hue="slate", radius_size="md", text_size="md", font=FONTS,
                         font_mono=["ui-monospace", "Cascadia Code", "Menlo", "monospace"]).set(
        body_background_fill="*neutral_50", body_background_fill_dark="*neutral_950",
        block_background_fill="transparent", block_background_fill_dark="transparent",
        block_border_width="0px", block_shadow="none")


def build_page(parts) -> gr.Blocks:
    """The whole page. `parts` are the program's: chats, models, jobs."""
    with gr.Blocks(title=TEXT["app"], fill_width=True, fill_height=True, analytics_enabled=False) as page:
        with gr.Row(elem_id="shell", equal_height=False):
            with gr.Column(elem_id="left", scale=0):
                _element("conversation", "list")
            with gr.Column(elem_id="center", scale=1):
                _element("conversation", "chat")
            with gr.Column(elem_id="right", scale=0), gr.Tabs():
                with gr.Tab(TEXT["tab_engine"], id="engine"):
                    _element("engine", "figures")
                    _engine_controls(parts)
                with gr.Tab(TEXT["tab_chat"], id="settings"):
                    _element("conversation", "settings")
    return page


def _element(room: str, name: str) -> gr.HTML:
    """An own element: assets/ui/ROOM/NAME.js fills it."""
    return gr.HTML(html_template=f'<div class="floe-{name}"></div>', elem_id=f"floe-{name}",
                   apply_default_css=False,
                   js_on_load=f"import('/ui/{room}/{name}.js').then(m => m.mount(element.firstElementChild, trigger))")


def _engine_controls(parts) -> None:
    level = gr.Dropdown(choices=list(LEVELS), value=parts.models.level, label=TEXT["level"],
                        info=TEXT["level_info"], interactive=False, elem_id="level")
    near = gr.Slider(0, 1, value=1, step=0.25, label=TEXT["near"], info=TEXT["near_info"], interactive=False,
                     elem_id="near", buttons=[])
    planned = gr.Button(TEXT["near_planned"], size="sm", elem_id="near-planned")
    panel = _element("engine", "panel")

    def present():
        return _level_update(parts), _near_update(parts)

    def set_level(wished: str):
        return _configure(parts, level=wished)

    def set_near(mebibytes: float):
        return _configure(parts, near_bytes=int(mebibytes * _MIB))

    panel.change(present, None, [level, near], **FREE)  # the script triggers it when a model has been opened
    level.input(set_level, level, [level, near], **FREE)
    near.release(set_near, near, [level, near], **FREE)
    planned.click(lambda: _configure(parts, near_bytes=None), None, [level, near], **FREE)


def _configure(parts, **changes):
    try:
        parts.models.configure(**changes)
    except UserError as error:
        parts.models.refuse(error)
    return _level_update(parts), _near_update(parts)


def _level_update(parts):
    """The wished level: it runs from the next answer on."""
    levels = parts.models.info().get("levels") or {}
    choices = [(_level_name(name, levels), name) for name in LEVELS if name in levels]
    return gr.update(choices=choices or list(LEVELS), value=parts.models.options.level, interactive=bool(choices),
                     info=_about_levels(parts.models.levels()))


def _about_levels(expected: dict[str, float]) -> str:
    """expected: tokens a second by level."""
    if list(expected) == ["exact"]:
        return TEXT["level_unmeasured"]
    faster = [name for name, speed in expected.items() if speed > FASTER * expected.get("exact", math.inf)]
    return TEXT["level_info"] if faster or not expected else TEXT["level_slower"]


def _level_name(name: str, levels) -> str:
    perplexity = levels[name].get("perplexity")
    return TEXT["level_choice"].format(name=name, perplexity=perplexity) if perplexity else name


def _near_update(parts):
    snapshot = parts.models.snapshot()
    if "near_bytes" not in snapshot:
        return gr.update(interactive=False)
    least = math.ceil(4 * snapshot["near_least_bytes"] / _MIB) / 4
    most = math.ceil(4 * max(snapshot["near_most_bytes"], snapshot["near_bytes"]) / _MIB) / 4
    most = max(most, least + 0.25)  # a slider has two ends, however small the model
    wished = parts.models.options.near_bytes or snapshot["near_bytes"]  # an answer may still be under way
    now = min(max(round(wished / _MIB, 2), least), most)
    return gr.update(minimum=least, maximum=most, value=now, step=0.25, interactive=True)
