"""The page's layout: three columns of Gradio blocks, and which control calls what. No state lives here.

Conversations, messages and the panel are own elements (assets/ui), because a conversation of 400 messages must stay
light; what a person sets is Gradio's. The scripts tell this side which conversation is open through the element's
`select` event, so there is no gr.State and with it no heartbeat connection for each tab.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import gradio as gr

from app.chat.chat_settings import EFFORTS, SAMPLING_NAMES, Presets, checked
from app.chat.titles import MODEL_TITLES
from app.strings import TEXT
from engine import LEVELS, MachineError, UserError

HEAD = ('<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="stylesheet" href="/ui/style.css"><link rel="stylesheet" href="/ui/code.css">')
FONTS = ["system-ui", "Segoe UI", "Roboto", "Noto Sans", "sans-serif"]  # the system's own: nothing is fetched
_MIB = 1 << 20
# always_last: Gradio's own choice drops what a person does while the same event's last answer is still under way
FREE = {"queue": False, "show_progress": "hidden", "api_visibility": "private", "trigger_mode": "always_last"}
MAY_WARN = FREE | {"queue": True}  # Gradio shows a warning only where the event went through its queue
IN_TURN = MAY_WARN | {"concurrency_id": "settings", "concurrency_limit": 1}  # what is kept is what was set just before


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
                _element("list")
            with gr.Column(elem_id="center", scale=1):
                chat = _element("chat")
                opened = gr.Textbox("", visible="hidden", elem_id="opened")  # always in the document, as no tab is
            with gr.Column(elem_id="right", scale=0), gr.Tabs():
                with gr.Tab(TEXT["tab_engine"], id="engine"):
                    _engine_controls(parts)
                with gr.Tab(TEXT["tab_chat"], id="settings"), gr.Column(elem_id="settings"):
                    _chat_controls(parts, chat, opened)
                with gr.Tab(TEXT["tab_models"], id="models"):
                    _element("models")
    return page


def _element(name: str) -> gr.HTML:
    """An own element: assets/ui/NAME.js fills it."""
    return gr.HTML(html_template=f'<div class="floe-{name}"></div>', elem_id=f"floe-{name}",
                   apply_default_css=False,
                   js_on_load=f"import('/ui/{name}.js').then(m => m.mount(element.firstElementChild, trigger))")


def _engine_controls(parts) -> None:
    level = gr.Dropdown(choices=list(LEVELS), value=parts.models.level, label=TEXT["level"],
                        info=TEXT["level_info"], interactive=False, elem_id="level")
    near = gr.Slider(0, 1, value=1, step=0.25, label=TEXT["near"], info=TEXT["near_info"], interactive=False,
                     elem_id="near")
    panel = _element("panel")
    titles = gr.Checkbox(label=TEXT["model_titles"], info=TEXT["model_titles_info"], elem_id="model-titles")

    def present():
        return _level_update(parts), _near_update(parts), parts.chats.preference(MODEL_TITLES, True)

    def set_level(wished: str):
        return _configure(parts, level=wished)

    def set_near(mebibytes: float):
        return _configure(parts, near_bytes=int(mebibytes * _MIB))

    def set_titles(wished: bool):
        parts.chats.set_preference(MODEL_TITLES, wished)

    panel.change(present, None, [level, near, titles], **FREE)  # the script triggers it when a model has been opened
    level.input(set_level, level, [level, near], **MAY_WARN)
    near.release(set_near, near, [level, near], **MAY_WARN)
    titles.input(set_titles, titles, None, **FREE)


def _configure(parts, **changes):
    try:
        parts.models.configure(replace(parts.models.options, **changes))
    except (UserError, MachineError) as error:
        gr.Warning(str(error))
    return _level_update(parts), _near_update(parts)


def _level_update(parts):
    info = parts.models.info()
    levels = info.get("levels") or {}
    choices = [(_level_name(name, levels), name) for name in LEVELS if name in levels]
    about = TEXT["level_unmeasured"] if list(levels) == ["exact"] else TEXT["level_info"]
    return gr.update(choices=choices or list(LEVELS), value=parts.models.level, interactive=bool(choices), info=about)


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
    now = min(max(round(snapshot["near_bytes"] / _MIB, 2), least), most)
    return gr.update(minimum=least, maximum=most, value=now, step=0.25, interactive=True)


def _chat_controls(parts, chat: gr.HTML, opened: gr.Textbox) -> None:
    """System prompt, thinking, context policy and sampling of the open conversation.

    opened: its name and how often the script (settings.js) has asked, as it knows an answer by. The numbers have no
    bounds of Gradio's: its error is no sentence, `checked` has one.
    """
    controls = {
        "system": gr.Textbox(label=TEXT["system_prompt"], placeholder=TEXT["system_hint"], lines=3, max_lines=10),
        "policy": gr.Dropdown([(TEXT["policy_stop"], "stop"), (TEXT["policy_oldest"], "oldest"),
                               (TEXT["policy_newest"], "newest")], label=TEXT["policy"]),
        "thinking": gr.Dropdown([(TEXT["think_model"], "model"), (TEXT["think_on"], "on"), (TEXT["think_off"], "off")],
                                label=TEXT["think"]),
        "effort": gr.Dropdown([(TEXT["think_model"], "model"), *[(name, name) for name in EFFORTS]],
                              label=TEXT["effort"]),
        "keep_thinking": gr.Checkbox(label=TEXT["keep_thinking"]),
        "preset": gr.Dropdown(label=TEXT["preset"]),  # a person's names are no part of the bare page
        "temperature": gr.Number(label=TEXT["temperature"], step=0.05),
        "top_k": gr.Number(label=TEXT["top_k"], precision=0),
        "top_p": gr.Number(label=TEXT["top_p"], step=0.01),
        "min_p": gr.Number(label=TEXT["min_p"], step=0.01),
        "repetition_penalty": gr.Number(label=TEXT["repetition_penalty"], step=0.01),
        "seed": gr.Number(label=TEXT["seed"], precision=0),
        "max_tokens": gr.Number(label=TEXT["max_tokens"], precision=0),
    }
    reset = gr.Button(TEXT["reset"], size="sm", elem_id="reset")
    name = gr.Textbox(label=TEXT["preset_name"], placeholder=TEXT["preset_hint"], max_lines=1, elem_id="preset-name")
    with gr.Row():
        keep = gr.Button(TEXT["preset_keep"], size="sm", elem_id="preset-keep")
        forget = gr.Button(TEXT["preset_forget"], size="sm", elem_id="preset-forget")
    _bind(parts, chat, opened, controls, reset)
    _bind_presets(parts, opened, controls, name, keep, forget)


def _bind(parts, chat: gr.HTML, opened: gr.Textbox, controls: dict, reset: gr.Button) -> None:
    """Every control stores its own value and answers for itself and the preset: what a person types into another one
    meanwhile is neither overwritten nor stored half."""
    names, drafts, presets = list(controls), parts.drafts, Presets(parts.chats)

    def show(event: gr.EventData):
        values = _hints(parts, names) if event.same else _values(parts, names, drafts.settings(event.name))
        return [f"{event.name} {event.turn}", *values]

    def to_defaults(shown: str):
        def only_system(stored: dict) -> dict:
            return {n: v for n, v in stored.items() if n == "system"}
        return _keep(parts, _name_in(shown), only_system, names, names)

    def storing(name: str):
        touched = names if name == "preset" else [name, "preset"]

        def store(shown: str, value):
            def change(stored: dict) -> dict:
                return presets.chosen(value, stored) if name == "preset" else _changed(stored, name, value)
            return _keep(parts, _name_in(shown), change, names, touched)
        return store

    # multiple: an event that is put off, as in always_last, would come with the data of the one before it
    chat.select(show, None, [opened, *controls.values()], **FREE | {"trigger_mode": "multiple"})
    for name, control in controls.items():
        event = control.blur if isinstance(control, (gr.Textbox, gr.Number)) else control.input
        event(storing(name), [opened, control], list(controls.values()), **IN_TURN)
    reset.click(to_defaults, opened, list(controls.values()), **IN_TURN)


def _bind_presets(parts, opened: gr.Textbox, controls: dict, name: gr.Textbox, keep: gr.Button, forget: gr.Button):
    """Keeping what is set under a name, and deleting such a preset; the conversation's settings stay."""
    presets, shown = Presets(parts.chats), [name, controls["preset"]]

    def after(work, whose: str):
        stored = parts.drafts.settings(_name_in(whose))
        try:
            work(stored)
        except UserError as error:
            gr.Warning(str(error))
            return gr.skip(), gr.skip()
        return "", gr.update(choices=presets.choices(), value=presets.name_of(stored))

    def on_keep(whose: str, wished: str):
        return after(lambda stored: presets.keep(wished, stored), whose)

    def on_forget(whose: str, seen: str):
        return after(lambda stored: presets.forget(seen), whose)

    keep.click(on_keep, [opened, name], shown, **IN_TURN)
    name.submit(on_keep, [opened, name], shown, **IN_TURN)
    forget.click(on_forget, [opened, controls["preset"]], shown, **IN_TURN)


def _name_in(opened: str) -> str:
    """Whose settings the controls show; "" before they were told."""
    return opened.partition(" ")[0]


def _changed(stored: dict, name: str, value) -> dict:
    """Settings with one control's value; what is empty or the model's own is left out."""
    settings = {n: v for n, v in stored.items() if n != name}
    if value not in (None, "", "model"):
        settings[name] = value == "on" if name == "thinking" else value
    return settings


def _keep(parts, conversation: str, change: Callable[[dict], dict], names: list[str], touched: list[str]) -> list:
    """Store, and the new values of the touched controls; what cannot be is said and put back."""
    try:
        settings = parts.drafts.change(conversation, lambda stored: checked(change(stored)))
        parts.stream.changed()
    except UserError as error:
        gr.Warning(str(error))
        settings = parts.drafts.settings(conversation)
    values = dict(zip(names, _values(parts, names, settings), strict=True))
    return [values[name] if name in touched else gr.skip() for name in names]


def _values(parts, names: list[str], settings: dict) -> list:
    """What the controls show: the stored wish, else the model's recommendation as a faint hint, else nothing."""
    defaults = {"policy": "oldest", "thinking": "model", "effort": "model", "system": "", "keep_thinking": False}
    shown = settings | {"preset": Presets(parts.chats).name_of(settings)}
    if "thinking" in shown:
        shown["thinking"] = "on" if shown["thinking"] else "off"
    hints = zip(names, _hints(parts, names), strict=True)
    return [hint | {"value": shown.get(name, defaults.get(name))} for name, hint in hints]


def _hints(parts, names: list[str]) -> list[dict]:
    """What depends on the open model and changes no value: the sampling that it recommends, which wishes its chat
    template knows; and the presets there are."""
    info = parts.models.info()
    recommended, asks = info.get("sampling") or {}, set(info.get("wishes") or ())
    known = {name: value for name, value in recommended.items() if value is not None}
    hints = {name: {"placeholder": str(known.get(name, ""))} for name in SAMPLING_NAMES}
    hints |= {"thinking": {"visible": not info or bool(asks & {"enable_thinking", "thinking"})},
              "effort": {"visible": not info or "reasoning_effort" in asks},
              "preset": {"choices": Presets(parts.chats).choices()}}
    return [gr.update(**hints.get(name, {})) for name in names]
