"""Folders that somebody made to hurt: `python -m tests.support.absurd_folders WORK` meets them all in one process.

Each is listed, planned and opened beside a good one. Prints a JSON line before each and one after it.
"""
from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.support.folders import as_format_1, listed_anew
from tests.support.small_model import EXPERTS, LAYERS, make

HUGE = (3_000_000, 10**9, 10**30, -1, 0, 2.5, "many", [], {"a": 1})
COUNTS = ("num_hidden_layers", "num_labels", "num_experts", "num_experts_per_tok", "num_attention_heads",
          "num_key_value_heads", "head_dim", "hidden_size", "moe_intermediate_size", "vocab_size", "sliding_window",
          "max_position_embeddings", "decoder_sparse_step")
FILES = ("config.json", "floe.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "generation_config.json", "special_tokens_map.json", "floe.source.json", "trunk.safetensors",
         "experts-00001.safetensors", ".floe.proved", "notes.txt")
Make = Callable[[Path], None]


Change = dict | Callable[[dict], object]


def in_json(folder: Path, name: str, change: Change) -> None:
    """In a folder without a list of its texts, or a checksum that would give it away."""
    if (folder / "floe.json").is_file():
        as_format_1(folder)
    path = folder / name
    raw = json.loads(path.read_text())
    raw.update(change) if isinstance(change, dict) else change(raw)
    path.write_text(json.dumps(raw))


def text(folder: Path, name: str, content: str | bytes) -> None:
    if (folder / "floe.json").is_file():
        as_format_1(folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def no_file(folder: Path, name: str, how: str) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path.name}[how])


def header(folder: Path, name: str, change: Callable[[dict], dict]) -> None:
    """Another header for a file of weights, and the manifest of its maker."""
    path = folder / name
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    raw = json.dumps(change(json.loads(data[8:8 + n]))).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + n:])
    listed_anew(folder)


def level(**found) -> dict:
    return {"calibration": {"levels": {"fast": found}}}


def deep(n: int) -> str:
    return "[" * n + "]" * n


def configurations() -> Iterator[tuple[str, Make]]:
    for key in COUNTS:
        for value in HUGE if key in COUNTS[:3] else HUGE[:4]:
            yield f"config {key} {value}", partial(in_json, name="config.json", change={key: value})
    for name, changes in {
            "from_checkpoint": {"quantization_config": {"quant_method": "floe", "from_checkpoint": True}},
            "auto_map": {"auto_map": {"AutoConfig": "run.Me"}}, "dense": {"model_type": "llama"},
            "another kind": {"model_type": "gpt_oss"}, "layer types": {"layer_types": ["x"] * 10**5},
            "labels": {"id2label": {str(i): "x" for i in range(10**5)}}, "dtype": {"dtype": "float7"},
            "rope": {"rope_parameters": {"rope_type": "yarn", "factor": 1e300, "rope_theta": 0}},
            "activation": {"hidden_act": "os.system"}, "architectures": {"architectures": [1, {"a": []}]},
            "weights": {"transformers_weights": "../../../etc/passwd"}, "tokens": {"eos_token_id": [10**18] * 1000},
            }.items():
        yield f"config {name}", partial(in_json, name="config.json", change=changes)
    for name, content in {"deep": '{"a": ' + deep(100_000) + "}", "brackets": "[" + "[]," * 3_000_000 + "1]",
                          "utf-8": b'{"a": "\xff\xfe"}', "a number": "1", "nothing": "", "NaN": '{"hidden_size": NaN}',
                          "long number": '{"hidden_size": ' + "9" * 10_000 + "}"}.items():
        for file in ("config.json", "floe.json", "tokenizer_config.json"):
            yield f"{file} {name}", partial(text, name=file, content=content)


def manifests() -> Iterator[tuple[str, Make]]:
    for name, change in {
            "layers": {"layers": 10**9}, "experts": {"experts": 10**9}, "neurons": {"neurons": 2**60},
            "hidden": {"hidden": 2**60}, "infinite": {"hidden": 1e999}, "top_k": {"top_k": True},
            "no files": {"files": []}, "files": {"files": {"a": 1}}, "entry": {"files": [[1]]},
            "levels a list": {"calibration": {"levels": [1]}}, "calibration": {"calibration": [1]},
            "level unknown": {"calibration": {"levels": {"<b>": {}}}}, "level a text": {"calibration": {"levels": "x"}},
            "zero budgets": level(budgets=[[0, 0]] * LAYERS), "fractions": level(budgets=[[1.5, 1]] * LAYERS),
            "true budgets": level(budgets=[[True, 1]] * LAYERS), "huge budgets": level(budgets=[[2**70, 1]] * LAYERS),
            "short budgets": level(budgets=[[1, 1]]), "long pairs": level(budgets=[[1, 1, 1]] * LAYERS),
            "thresholds": level(thresholds=[[1e308] * EXPERTS] * LAYERS),
            "thresholds NaN": level(thresholds=[[float("nan")] * EXPERTS] * LAYERS),
            "thresholds short": level(thresholds=[[1.0]]), "perplexity": level(perplexity=[[["x"]]]),
            "curves": {"calibration": {"miss_curves": {"blob": [[float("inf"), 1]]}}},
            "curves of text": {"calibration": {"miss_curves": {"blob": "abc"}}},
            "version": {"format_version": 10**6}, "version a text": {"format_version": "1"},
            "version none": {"format_version": None}, "unknown key": {"run": "x"}, "bits": {"trunk_bits": 8.0},
            "group": {"group_size": [64]}}.items():
        yield f"floe.json {name}", partial(in_json, name="floe.json", change=change)
    for path in ("../x", "/etc/passwd", "a/b", "", ".", "a\nb", "C:\\x", None, 7):
        entry = {"path": path, "bytes": 0, "sha256": "0" * 64}
        yield f"floe.json path {path!r}", partial(in_json, name="floe.json", change=lambda raw, entry=entry:
                                                  raw["files"].append(entry))


def tokenizers() -> Iterator[tuple[str, Make]]:
    def replace(pattern: dict, content: str) -> dict:
        return {"type": "Replace", "pattern": pattern, "content": content}
    many = replace({"String": "a"}, "a" * 10_000)
    for name, change in {
            "expands": {"normalizer": many}, "expands when decoded": {"decoder": many},
            "expands in steps": {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "aaaaaaa")]
                                                * 12}},
            "for ever": {"normalizer": replace({"Regex": "(a+)+$"}, "b")},
            "splits for ever": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(a|aa)+$"},
                                                  "behavior": "Isolated", "invert": False}},
            "prepends": {"normalizer": {"type": "Prepend", "prepend": "x" * 10_000}},
            "no model": {"model": {}}, "another model": {"model": {"type": "Unigram", "vocab": [["a", -1e308]] * 10}},
            "version": {"version": "9"}, "added": {"added_tokens": [{"id": 10**9, "content": ""}]}}.items():
        yield f"tokenizer {name}", partial(in_json, name="tokenizer.json", change=change)
    for name, change in {
            "long word": lambda raw: raw["model"]["vocab"].update({"x" * 100_000: 7}),
            "long added": lambda raw: raw["added_tokens"].append(raw["added_tokens"][0] | {"id": 9999, "content":
                                                                                           "y" * 100_000}),
            "ids": lambda raw: raw["model"]["vocab"].update({word: 2**31 for word in list(raw["model"]["vocab"])[:9]}),
            "no words": lambda raw: raw["model"].update(vocab={}, merges=[])}.items():
        yield f"tokenizer {name}", partial(in_json, name="tokenizer.json", change=change)
    for name, content in {"class": '{"tokenizer_class": "os.system"}', "list": "[]", "template": '{"chat_template": 7}',
                          "templates": '{"chat_template": [{"name": "default"}]}', "length":
                          '{"model_max_length": 1e999}', "tokens": '{"eos_token": {"a": 1}}'}.items():
        yield f"tokenizer_config.json {name}", partial(text, name="tokenizer_config.json", content=content)


def weights() -> Iterator[tuple[str, Make]]:
    def of(name: str, **changes):
        return lambda raw: raw | {name: raw[name] | changes}
    for name, change in {
            "BOOL": of("blobs", dtype="BOOL"), "F8": of("blobs", dtype="F8_E4M3"), "no type": of("blobs", dtype=[]),
            "negative": of("blobs", data_offsets=[-8, -1]), "backwards": of("blobs", data_offsets=[9, 3]),
            "huge": of("blobs", shape=[2**62, 2**62]), "flat": of("blobs", shape=[1]), "text": of("blobs", shape="ab"),
            "I32 sums": of("checksums", dtype="I32"), "no sums": lambda raw: {k: raw[k] for k in raw if k[0] != "c"},
            "list": lambda raw: [raw], "deep": lambda raw: raw | {"a": json.loads(deep(900))}}.items():
        yield f"experts {name}", partial(header, name="experts-00001.safetensors", change=change)
    for n in (2**63, 2**40, 10**6, 0):
        yield f"experts header of {n}", partial(length, n=n)


def length(folder: Path, n: int) -> None:
    data = (folder / "experts-00000.safetensors").read_bytes()
    (folder / "experts-00000.safetensors").write_bytes(n.to_bytes(8, "little") + data[8:])
    listed_anew(folder)


def checkpoints() -> Iterator[tuple[str, Make]]:
    for key in COUNTS:
        for value in HUGE[:2]:
            yield f"config {key} {value}", partial(in_json, name="config.json", change={key: value})
    for name, content in {
            "list": '{"weight_map": [1]}', "deep": deep(100_000),
            "outside": '{"weight_map": {"a": "../x.safetensors"}}',
            "numbers": '{"weight_map": {"a": 7}}', "many": json.dumps({"weight_map": dict.fromkeys(
                map(str, range(300_000)), "model.safetensors")}), "utf-8": b'{"\xff": 1}', "itself":
            '{"weight_map": {"a": "model.safetensors.index.json"}}', "null": '{"weight_map": null}'}.items():
        yield f"index {name}", partial(text, name="model.safetensors.index.json", content=content)
    for name in ("model.safetensors", "model.safetensors.index.json", "config.json"):
        for how in ("pipe", "device", "loop", "folder"):
            yield f"{name} is a {how}", partial(no_file, name=name, how=how)
    for changes in ({"quantization_config": "x"}, {"text_config": [1]}, {"text_config": {"quantization_config": 7}},
                    {"quantization_config": {"quant_method": ["fp8"]}}, {"model_type": ["a"]}, {"model_type": None}):
        yield f"config {changes}", partial(in_json, name="config.json", change=changes)


# --- GGUF: nothing but a header -----------------------------------------------------------------------------------
def gguf_text(words: str | bytes) -> bytes:
    words = words.encode() if isinstance(words, str) else words
    return struct.pack("<Q", len(words)) + words


def gguf_list(kind: int, n: int) -> bytes:
    return struct.pack("<IIQ", 9, kind, n)


def gguf_files() -> Iterator[tuple[str, Make]]:
    architecture = gguf_text("general.architecture") + struct.pack("<I", 8) + gguf_text("qwen3moe")
    key, tensor = gguf_text("a.b"), gguf_text("token_embd.weight")
    fields = {
        "bytes": gguf_list(0, 3 * 10**8), "numbers": gguf_list(4, 3 * 10**8), "words": gguf_list(8, 3 * 10**8),
        "words that are there": gguf_list(8, 3 * 10**8), "2^63 words": gguf_list(8, 2**63),
        "lists": gguf_list(9, 10**6),
        "lists in lists": gguf_list(9, 1) * 1000, "list of nothing known": gguf_list(77, 1), "kind": b"\x63\0\0\0",
        "long text": struct.pack("<IQ", 8, 2**63), "longer text": struct.pack("<IQ", 8, 2**40),
        "no utf-8": struct.pack("<I", 8) + gguf_text(b"\xff\xfe"), "cut": b"\x08"}
    for name, field in fields.items():
        yield f"gguf {name}", partial(gguf, fields=[architecture, key + field], hole=name == "words that are there")
    for name, field in {"key no utf-8": gguf_text(b"\xff") + b"\0\0\0\0\1", "twice": architecture,
                        "alignment 0": gguf_text("general.alignment") + struct.pack("<II", 4, 0),
                        "alignment 3": gguf_text("general.alignment") + struct.pack("<II", 4, 3),
                        "alignment huge": gguf_text("general.alignment") + struct.pack("<II", 4, 2**31),
                        "alignment a text": gguf_text("general.alignment") + struct.pack("<I", 8) + key}.items():
        yield f"gguf {name}", partial(gguf, fields=[architecture, field])
    for name, info in {"dimensions": struct.pack("<I2QIQ", 2, 2**60, 2**60, 0, 0), "axes": struct.pack("<I", 2**31),
                       "no axes": struct.pack("<IIQ", 0, 0, 0), "offset": struct.pack("<IQIQ", 1, 32, 0, 2**63),
                       "nothing": struct.pack("<IQIQ", 1, 0, 0, 0), "kind": struct.pack("<IQIQ", 1, 32, 99, 0),
                       "row": struct.pack("<IQIQ", 1, 33, 12, 0)}.items():
        yield f"gguf tensor {name}", partial(gguf, fields=[architecture], tensors=[tensor + info])
    yield "gguf long name", partial(gguf, fields=[gguf_text("general.architecture") + struct.pack("<I", 8)
                                                  + gguf_text("x" * 10**7)])
    for name, start in {"fields": struct.pack("<IQQ", 3, 0, 2**60), "tensors": struct.pack("<IQQ", 3, 2**60, 0),
                        "version": struct.pack("<IQQ", 99, 0, 0), "turned": struct.pack(">IQQ", 3, 0, 0)}.items():
        yield f"gguf {name}", partial(gguf, fields=[], start=start)
    for how in ("pipe", "device", "loop", "folder"):
        yield f"gguf is a {how}", partial(no_file, name="model.gguf", how=how)


def gguf(folder: Path, fields: list[bytes], tensors: tuple = (), start: bytes = b"", hole: bool = False) -> None:
    start = start or struct.pack("<IQQ", 3, len(tensors), len(fields))
    (folder / "model.gguf").write_bytes(b"GGUF" + start + b"".join(fields) + b"".join(tensors))
    if hole:  # the file is as long as it says, and nearly empty
        os.truncate(folder / "model.gguf", 3 * 10**9)


def cases() -> Iterator[tuple[str, str, Make]]:
    """What it is, in which of the good folders, and what is done to it."""
    for name, damage in compressed():
        yield name, "good", damage
    for name, damage in checkpoints():
        yield f"checkpoint: {name}", "checkpoint", damage
    for name, damage in gguf_files():
        yield name, "checkpoint", damage


def compressed() -> Iterator[tuple[str, Make]]:
    yield from configurations()
    yield from manifests()
    yield from tokenizers()
    yield from weights()
    for name in FILES:
        for how in ("pipe", "device", "loop", "folder"):
            yield f"{name} is a {how}", partial(no_file, name=name, how=how)


def meet(folder: Path, data: Path) -> str:
    """List, plan and open it, or import what it holds; -> the sentence, or what it answered."""
    from engine import MachineError, UserError, import_gguf, look_up, models, plan_for, this_machine
    there = {model.name for model in models(data)}
    assert "good" in there, there
    said = []
    steps = (lambda: str(plan_for(look_up(str(folder)), this_machine(data)[0])), lambda: answer(folder))
    if os.path.lexists(folder / "model.gguf"):
        steps = (lambda: f"imported: {import_gguf(folder / 'model.gguf', data / 'imported', folder)}",)
    for step in steps:
        try:
            said.append(step())
        except (UserError, MachineError) as error:
            assert str(error).endswith(".") and "\n" not in str(error) and len(str(error)) < 600, str(error)
            said.append(str(error))
    return said[-1]


def answer(folder: Path) -> str:
    from engine import Engine, Options, Sampling, UserError
    with Engine.open(folder, Options("balanced", device="cpu")) as engine:
        events = list(engine.chat([{"role": "user", "content": "a story of a dog"}],
                                  Sampling(temperature=0, max_tokens=4)))
    if events[-1].reason == "error":
        raise UserError(events[-1].text)
    return "answered: " + "".join(event.text for event in events if event.kind == "answer")


def main(work: Path, wanted: str = "") -> None:
    demo = Path(__file__).resolve().parents[2] / "assets" / "demo"
    for made, name in zip(make(work / "made", demo), ("checkpoint", "good"), strict=True):
        shutil.copytree(made, work / "models" / name)
    good = answer(work / "models" / "good")
    for name, kind, damage in cases():
        if wanted not in name:
            continue
        print(json.dumps({"case": name}), flush=True)
        folder = shutil.copytree(work / "models" / kind, work / "models" / "bad")
        damage(folder)
        begun = time.process_time()
        try:
            said = meet(folder, work)
        except Exception as error:
            import traceback
            traceback.print_exc()
            said = f"TRACEBACK {type(error).__name__}: {error}"
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"said": said, "seconds": time.process_time() - begun, "most_kilobytes": most}), flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(work / "imported", ignore_errors=True)
    assert answer(work / "models" / "good") == good
    print(json.dumps({"end": True}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
