"""Small conversations as other programs write them, after real exports: branches, thinking, tools, attachments."""
from __future__ import annotations

import io
import json
import zipfile

SCRIPT = "<script>document.title = 'caught'</script><img src=x onerror=\"document.title='caught'\">"


def chatgpt(title="Boats", turns=1, later=0):
    """later: seconds. A question, thinking, a search and two answers; the first is shown. Then an edited question."""
    def node(key, parent, role=None, content=None, at=None, **more):
        message = role and {"id": key, "author": {"role": role}, "create_time": at, "content": content,
                            "recipient": "all", "metadata": {"model_slug": "gpt-5"}} | more
        return {"id": key, "parent": parent, "message": message, "children": []}

    def text(*parts):
        return {"content_type": "text", "parts": list(parts)}
    nodes = [
        node("root", None), node("system", "root", "system", text("")),
        node("q", "system", "user", {"content_type": "multimodal_text", "parts": [
            {"content_type": "image_asset_pointer", "asset_pointer": "sediment://file_1"}, "What floats?"]},
             1700000000.5, metadata={"attachments": [{"id": "file_1", "name": "boat.png"}]}),
        node("think", "q", "assistant", {"content_type": "thoughts", "thoughts": [
            {"summary": "Thinking of boats", "content": "Wood is light."}]}, 1700000001.0),
        node("recap", "think", "assistant", {"content_type": "reasoning_recap", "content": "Thought for 5s"}),
        node("call", "recap", "assistant", {"content_type": "code", "language": "python", "text": "float(1)"},
             recipient="python"),
        node("result", "call", "tool", {"content_type": "execution_output", "text": "1.0"}),
        node("a1", "result", "assistant", text(f"Boats do \ue200cite\ue202turn0search1\ue201. {SCRIPT}"), 1700000005.0,
             metadata={"model_slug": "gpt-5", "content_references": [
                 {"matched_text": "\ue200cite\ue202turn0search1\ue201", "alt": "([wiki](https://example.org))"}]}),
        node("a2", "q", "assistant", text("Corks do."), 1700000006.0),
        node("q2", "a1", "user", text("And stones?"), 1700000010.0),
        node("q2b", "a1", "user", text("And ice?"), 1700000011.0),
        node("end", "q2", "assistant", text("They sink."), 1700000012.0)]
    for turn in range(turns - 1):
        nodes += [node(f"u{turn}", nodes[-1]["id"], "user", text(f"More {turn} " + "wave " * 50), 1.7e9 + turn),
                  node(f"v{turn}", f"u{turn}", "assistant", text(f"Answer {turn} " + "sea " * 200), 1.7e9 + turn)]
    mapping = {each["id"]: each for each in nodes}
    for each in nodes:
        if each["parent"]:
            mapping[each["parent"]]["children"].append(each["id"])
    return {"id": title, "conversation_id": title, "title": title, "create_time": 1700000000.25 + later,
            "update_time": 1700000020.75, "mapping": mapping, "current_node": nodes[-1]["id"]}


CLAUDE = {
    "uuid": "c1", "name": "Harbour", "created_at": "2026-01-02T03:04:05.000000Z", "updated_at": "2026-01-02T04:00:00Z",
    "account": {"uuid": "me"}, "chat_messages": [
        {"uuid": "h1", "parent_message_uuid": "00000000-0000-4000-8000-000000000000", "sender": "human",
         "text": "Read it", "content": [{"type": "text", "text": "Read it"}], "created_at": "2026-01-02T03:04:06Z",
         "attachments": [{"file_name": "log.txt", "extracted_content": "wind 3"}],
         "files": [{"file_name": "map.pdf", "file_uuid": "f"}]},
        {"uuid": "a1", "parent_message_uuid": "h1", "sender": "assistant", "text": "",
         "created_at": "2026-01-02T03:04:09Z", "content": [{"type": "thinking", "thinking": "Calm."},
                     {"type": "tool_use", "name": "artifacts", "input": {"title": "Log", "content": "```\nx\n```"}},
                     {"type": "tool_result", "content": [{"type": "text", "text": "made"}]},
                     {"type": "text", "text": "Wind of three."}]},
        {"uuid": "a2", "parent_message_uuid": "h1", "sender": "assistant", "text": "Old form.", "content": [],
         "created_at": "2026-01-02T03:05:09Z"}]}

OPEN_WEBUI = {
    "id": "w", "user_id": "u", "title": "Tides", "created_at": 1750000000, "updated_at": 1750000100, "pinned": True,
    "chat": {"title": "Tides", "params": {"system": "You are a sailor."}, "messages": [], "history": {
        "currentId": "2", "messages": {
            "1": {"id": "1", "parentId": None, "childrenIds": ["2", "3"], "role": "user", "content": "Why tides?",
                  "timestamp": 1750000001, "files": [{"type": "file", "file": {
                      "filename": "moon.txt", "data": {"content": "The moon pulls."}}}]},
            "2": {"id": "2", "parentId": "1", "childrenIds": [], "role": "assistant", "model": "qwen3",
                  "timestamp": 1750000002, "content": '<details type="reasoning" done="true" duration="2">\n'
                  "<summary>Thought for 2 seconds</summary>\n&gt; Moon &amp; sun.\n&gt; Both.\n</details>\nThe moon."},
            "3": {"id": "3", "parentId": "1", "childrenIds": [], "role": "assistant", "content": "The sun.",
                  "timestamp": 1750000003}}}}}

LM_STUDIO = {
    "name": "Knots", "createdAt": 1760000000000, "pinned": False, "systemPrompt": "Short.",
    "lastUsedModel": {"identifier": "gpt-oss-20b"}, "messages": [
        {"currentlySelected": 0, "versions": [{"type": "singleStep", "role": "user", "content": [
            {"type": "text", "text": "A knot?"},
            {"type": "file", "fileIdentifier": "1 - rope.png", "fileType": "image"}]}]},
        {"currentlySelected": 1, "versions": [
            {"type": "multiStep", "role": "assistant", "steps": [
                {"type": "contentBlock", "content": [{"type": "text", "text": "<think>Hm</think>Reef."}]}]},
            {"type": "multiStep", "role": "assistant", "senderInfo": {"senderName": "gpt-oss-20b"}, "steps": [
                {"type": "contentBlock", "style": {"type": "thinking"},
                 "content": [{"type": "text", "text": "Which?"}]},
                {"type": "contentBlock", "content": [{"type": "text", "text": "Bowline."}]},
                {"type": "debugInfoBlock", "debugInfo": "x"}]}]},
        {"currentlySelected": 0, "versions": [{"type": "singleStep", "role": "user", "content": [
            {"type": "text", "text": "Thanks"}]}]}]}

JAN_THREAD = {"id": "t1", "object": "thread", "title": "Sails", "created": 1770000000, "updated": 1770000050,
              "assistants": [{"assistant_id": "jan", "instructions": "Be kind."}]}
JAN_MESSAGES = [
    {"id": "m1", "object": "thread.message", "thread_id": "t1", "role": "user", "created_at": 1770000001000,
     "content": [{"type": "text", "text": {"value": "A sail?", "annotations": []}},
                 {"type": "image_url", "image_url": {"url": "data:"}}]},
    {"id": "m2", "object": "thread.message", "thread_id": "t1", "role": "assistant", "created_at": 1770000002000,
     "metadata": {"modelId": "jan-nano"}, "content": [{"type": "reasoning", "text": {"value": "Cloth."}},
                                                      {"type": "text", "text": {"value": "Canvas."}}]}]


def zipped(**files) -> bytes:
    """Names with __ for a folder and _dot_ for a dot; values as text or to become JSON."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as box:
        for name, value in files.items():
            box.writestr(name.replace("__", "/").replace("_dot_", "."),
                         value if isinstance(value, str | bytes) else json.dumps(value))
    return out.getvalue()


def jan_zip() -> bytes:
    lines = "\n".join(map(json.dumps, JAN_MESSAGES))
    return zipped(threads__t1__thread_dot_json=JAN_THREAD, threads__t1__messages_dot_jsonl=lines,
                  threads__t2__thread_dot_json=JAN_THREAD | {"id": "t2", "title": "Empty"})
