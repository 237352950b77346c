"""The compressed folder byte by byte, by readers that share no code with the writer; and what is said of a bad one."""
from __future__ import annotations

import json
import logging
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch

from engine.core import MachineError, Options, UserError
from engine.files import proof
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import ExpertsFile, MappedFile, SafetensorsWriter
from engine.files.manifest import Manifest, experts_name
from engine.model import load
from kernels.layout import Layout
from kernels.planes import pack2, pack4, unpack2, unpack4
from tests.support.folders import as_format_1, compressed, edit, listed_anew

GROUP = 64


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """A checkpoint of hidden size 64 (padded to 256) with 8 experts of 48 neurons, and its compressed folder."""
    return compressed("qwen3_moe", tmp_path_factory.mktemp("format"))[1:]


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(made[1], tmp_path / "model")


# --- positions -----------------------------------------------------------------------------------------------------
def test_a_two_bit_code_sits_where_dp4a_wants_it():
    """Element e at bit 8*(e % 4) + 2*(e // 4)."""
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[6] = 3  # byte 2, second pair of bits
    assert pack2(codes).tolist() == [0, 0, 0b1100, 0]
    assert pack2(torch.tensor([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4, dtype=torch.uint8)).tolist() == [0b11100100] * 4
    assert pack2(torch.tensor([0, 1, 2, 3] * 4, dtype=torch.uint8)).tolist() == [0, 0x55, 0xAA, 0xFF]
    word = struct.unpack("<I", bytes(pack2(torch.arange(16, dtype=torch.uint8) % 4).tolist()))[0]
    assert [(word >> 2 * s) & 0x03030303 for s in range(4)] == [0x03020100] * 4


def test_a_four_bit_code_sits_likewise():
    """Element e at bit 8*(e % 4) + 4*(e // 4)."""
    assert pack4(torch.tensor([1, 2, 3, 4, 5, 6, 7, 15], dtype=torch.uint8)).tolist() == [0x51, 0x62, 0x73, 0xF4]


def test_planes_come_back(seed=0):
    generator = torch.Generator().manual_seed(seed)
    for top, pack, unpack in ((4, pack2, unpack2), (16, pack4, unpack4)):
        codes = torch.randint(0, top, (5, 512), dtype=torch.uint8, generator=generator)
        assert torch.equal(unpack(pack(codes)), codes)


@pytest.mark.parametrize("hidden, group, padded, sketch_row, prefix, record", [
    (2048, 128, 2048, 1152, 1088, 2304),     # the numbers of the design
    (2048, 64, 2048, 1280, 1152, 2432),      # 1024 + 2*128; 1024 + 128; 1024 + 384 + 1024
    (2880, 64, 3072, 1920, 1728, 3712),      # padded: 768*2 + 2*192; 1536 + 192; 1536 + 576 + 1536 -> 128s
    (4096, 128, 4096, 2304, 2176, 4480),
    (64, 64, 256, 160, 160, 384),            # padded four times: 64*2 + 2*16; 128 + 16 -> 160; 128 + 48 + 128 -> 384
    (320, 64, 512, 320, 288, 640),
])
def test_sizes(hidden, group, padded, sketch_row, prefix, record):
    layout = Layout(hidden, 48, group)
    assert (layout.padded, layout.sketch_row, layout.prefix, layout.record) == (padded, sketch_row, prefix, record)
    assert layout.blob_bytes == -(-48 * sketch_row // 128) * 128 + 48 * record
    assert layout.record % 128 == layout.prefix % 32 == layout.sketch_bytes % 128 == 0


@pytest.mark.parametrize("hidden, group", [(64, 128), (320, 128), (2048, 32), (100, 64), (96, 64)])
def test_groups_that_do_not_divide(hidden, group):
    with pytest.raises(ValueError, match="group size"):
        Layout(hidden, 8, group)


# --- one neuron read with nothing but struct -------------------------------------------------------------------------
def plain_header(path: Path) -> tuple[dict, int]:
    raw = path.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + n]), 8 + n


def halves(raw: bytes, at: int, n: int) -> list[tuple[float, float]]:
    found = struct.unpack_from(f"<{2 * n}e", raw, at)
    return list(zip(found[::2], found[1::2], strict=True))


def code(raw: bytes, at: int, e: int, bits: int) -> int:
    """Code of element e of the plane that starts at byte `at`."""
    per_word = 32 // bits
    word = struct.unpack_from("<I", raw, at + 4 * (e // per_word))[0]
    e %= per_word
    return word >> 8 * (e % 4) + bits * (e // 4) & (1 << bits) - 1


def neuron_by_hand(blob: bytes, n: int) -> dict[str, list[float]]:
    """hidden 64, padded 256, one group of 64 with content: sketch rows of 160 bytes, records of 384."""
    row, groups = n * 160, 4
    record = 48 * 160 + n * 384
    coarse = halves(blob, row + 128, 2 * groups)                # of gate, of up
    fine = halves(blob, record + 128, 3 * groups)               # of down, of gate, of up
    out = {"coarse_gate": [], "gate": [], "up": [], "down": []}
    for e in range(64):
        sketch = [code(blob, row, e, 2), code(blob, row + 64, e, 2)]
        refine = [code(blob, record + 176, e, 2), code(blob, record + 240, e, 2)]
        out["coarse_gate"].append(sketch[0] * coarse[0][0] + coarse[0][1])
        out["gate"].append((4 * sketch[0] + refine[0]) * fine[groups][0] + fine[groups][1])
        out["up"].append((4 * sketch[1] + refine[1]) * fine[2 * groups][0] + fine[2 * groups][1])
        out["down"].append(code(blob, record, e, 4) * fine[0][0] + fine[0][1])
    assert all(pair == (0, 0) for i, pair in enumerate(fine) if i % groups), "groups of the padding are worth nothing"
    return out


@pytest.mark.parametrize("layer, expert, neuron", [(0, 0, 0), (0, 3, 17), (1, 7, 47)])
def test_a_neuron_by_hand(made, layer, expert, neuron):
    source, folder = made
    path = folder / experts_name(layer)
    header, start = plain_header(path)
    low, high = header["blobs"]["data_offsets"]
    size = (high - low) // 8
    assert header["blobs"]["dtype"] == "U8" and header["blobs"]["shape"] == [8, size] and size == 48 * (160 + 384)
    assert (start + low) % 128 == size % 128 == 0
    blob = path.read_bytes()[start + low + expert * size:][:size]
    found, weights = neuron_by_hand(blob, neuron), Checkpoint.open(source).read_expert(layer, expert)
    for name, allowed in (("gate", 0.15), ("up", 0.15), ("down", 0.15), ("coarse_gate", 0.6)):
        expected = getattr(weights, name.removeprefix("coarse_"))[0, neuron]
        error = (torch.tensor(found[name]) - expected).norm() / expected.norm()
        assert error < allowed, name


def test_names_and_manifest(made):
    _, folder = made
    raw = json.loads((folder / "floe.json").read_text())
    assert {key: raw[key] for key in raw if key not in ("files", "calibration", "checksum")} == {
        "format_version": 2, "group_size": 64, "trunk_bits": 16, "layers": 2, "experts": 8, "top_k": 2, "neurons": 48,
        "hidden": 64}
    on_disk = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "floe.json"}
    assert {entry["path"]: entry["bytes"] for entry in raw["files"]} == on_disk
    assert set(on_disk) == {"trunk.safetensors", "experts-00000.safetensors", "experts-00001.safetensors",
                            "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"] == "floe"


# --- writer ----------------------------------------------------------------------------------------------------------
def test_a_file_appears_only_when_it_is_whole(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(RuntimeError, match="broken"), SafetensorsWriter(path, 1) as writer:
        writer.add("a", torch.zeros(3))
        raise RuntimeError("broken")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(AssertionError, match="fewer or more"), SafetensorsWriter(path, 1) as writer:
        writer.begin("a", torch.float32, (4,))
        writer.write(torch.zeros(3))
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_is_read_of_every_type(tmp_path):
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in (
        torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool)}
    tensors["empty"], tensors["scalar"] = torch.zeros(0, 4), torch.tensor(3.0)
    with SafetensorsWriter(tmp_path / "x.safetensors", len(tensors)) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    found = MappedFile(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(found.tensor(name), tensor) and found.tensor(name).dtype == tensor.dtype


def test_a_full_device_is_one_sentence(tmp_path):
    """/dev/full takes no byte; the writer's temporary name points there."""
    path = tmp_path / "x.safetensors"
    path.with_name("x.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(MachineError, match="disk is full.*finished is kept"):
        with SafetensorsWriter(path, 1) as writer:
            writer.add("a", torch.zeros(1 << 20))
    assert list(tmp_path.iterdir()) == []


# --- bad folders -----------------------------------------------------------------------------------------------------
def refuse(folder: Path, *words: str, run: bool = False) -> None:
    with pytest.raises(UserError) as caught:
        loaded = load.load(folder, Options("exact", device="cpu"))
        if run:
            loaded.model(torch.arange(3, 128)[None])
    text = str(caught.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 300, text
    assert all(word in text for word in words), text


def test_a_newer_format(folder):
    raw = json.loads((folder / "floe.json").read_text())
    (folder / "floe.json").write_text(json.dumps(raw | {"format_version": 4, "something": "new"}))
    refuse(folder, "newer Floe Chat", "format 4", "update")
    with pytest.raises(UserError, match="newer"):
        Manifest.load(folder)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "\x00", '{"format_version": "x"}', "[" * 100_000,
                                  '{"a": ' * 50_000, " " * 5_000_000])
def test_a_damaged_manifest(folder, text):
    (folder / "floe.json").write_text(text)
    refuse(folder, "floe.json is damaged")


@pytest.mark.parametrize("changes", [
    {"layers": -1}, {"layers": "2"}, {"experts": 0}, {"top_k": 9}, {"neurons": 48.0}, {"hidden": 100},
    {"group_size": 0}, {"trunk_bits": 5}, {"calibration": []}, {"calibration": {"levels": 3}},
    {"calibration": {"levels": {"fast": []}}},
    *({"calibration": {"levels": {"fast": {"budgets": budgets}}}} for budgets in (
        "x", [[1, 1]], [[1, 1, 1]] * 2, [[1, -1]] * 2, [[90, 7]] * 2, [["1", "1"]] * 2, [[0, 0]] * 2, [[1.5, 1]] * 2,
        [[True, 1]] * 2, [[2**70, 1]] * 2)),
    {"calibration": {"levels": [1]}}, {"calibration": {"levels": {"faster": {}}}},
    {"calibration": {"levels": {"floe": {"thresholds": [[1e30] * 8] * 2}}}},
    {"calibration": {"miss_curves": {"blob": [[float("inf"), 1]]}}}, {"layers": 10**9}, {"experts": 2**60},
    {"files": []}, {"files": {"a": 1}}, {"files": [[1]]}, {"format_version": None}, {"format_version": True},
    {"calibration": {"levels": {"floe": {"thresholds": [[0.1] * 8]}}}},
    {"calibration": {"levels": {"floe": {"thresholds": [[0.1] * 7] * 2}}}},
])
def test_a_manifest_with_numbers_that_no_model_has(folder, changes):
    as_format_1(folder)
    edit(folder / "floe.json", **changes)
    refuse(folder, "floe.json is damaged")


@pytest.mark.parametrize("name, changes, word", [
    *(("floe.json", {name: value}, "different models") for name, value in (
        ("layers", 1), ("experts", 4), ("top_k", 1), ("neurons", 64), ("hidden", 128))),
    ("floe.json", {"layers": 3}, "floe.json is damaged"),
    ("config.json", {"moe_intermediate_size": 64}, "different models"),
    ("config.json", {"num_hidden_layers": 1}, "damaged"), ("config.json", {"num_hidden_layers": 3}, "damaged"),
    ("config.json", {"vocab_size": 100}, "damaged"), ("config.json", {"hidden_size": 128}, "damaged"),
    ("config.json", {"quantization_config": None}, "damaged"), ("config.json", {"model_type": "llama"}, "no routed"),
])
def test_configuration_manifest_and_weights_of_different_models(folder, name, changes, word):
    as_format_1(folder)
    edit(folder / name, **changes)
    refuse(folder, word)


def test_what_nobody_foresaw_is_called_unknown_and_stands_in_the_log(folder, tmp_path):
    log = logging.FileHandler(tmp_path / "the.log")
    logging.getLogger().addHandler(log)
    try:
        edit(as_format_1(folder) / "config.json", quantization_config={"quant_method": "gptq"})
        refuse(folder, "the cause is unknown: TypeError", f"stands in {tmp_path.name}/the.log.")
    finally:
        logging.getLogger().removeHandler(log)
        log.close()
    assert "Traceback" in (tmp_path / "the.log").read_text() and "GPTQConfig" in (tmp_path / "the.log").read_text()


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/b", "", ".", ".x", "a\nb", "C:\\x", None, 7, "config.json"])
def test_a_manifest_names_plain_files_once(folder, path):
    raw = json.loads((as_format_1(folder) / "floe.json").read_text())
    entry = {"path": path, "bytes": 0, "sha256": "0" * 64}
    edit(folder / "floe.json", files=[*raw["files"], entry] + [entry] * (path == "config.json"))
    refuse(folder, "floe.json is damaged")


@pytest.mark.parametrize("name, entry", [
    ("blobs", {"dtype": "BOOL"}), ("blobs", {"dtype": "I8"}), ("blobs", {"shape": [1, 8 * 48 * 544]}),
    ("checksums", {"dtype": "F64"}), ("checksums", {"shape": [4, 2]})])
def test_experts_of_another_type_or_shape(folder, name, entry):
    """Made so, and listed so: the file is whole, and holds no experts of this model."""
    path = folder / experts_name(1)
    header, start = plain_header(path)
    raw = json.dumps(header | {name: header[name] | entry}).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + path.read_bytes()[start:])
    refuse(listed_anew(folder), experts_name(1), "other experts")


def test_experts_of_another_model(folder, tmp_path):
    """The manifest was made for these files; the model's own numbers are not theirs."""
    other = compressed("qwen3_moe", tmp_path / "other", moe_intermediate_size=32)[2]
    shutil.copyfile(other / experts_name(1), folder / experts_name(1))
    refuse(listed_anew(folder), experts_name(1), "other experts")


def test_a_weight_of_the_trunk_under_another_name_is_not_made_up(folder):
    path = folder / "trunk.safetensors"
    path.write_bytes(path.read_bytes().replace(b"layers.0.self_attn.q_proj", b"layers.0.self_attn.q_prox"))
    refuse(listed_anew(folder), "trunk.safetensors cannot be used")


@pytest.mark.parametrize("name", ["trunk.safetensors", "experts-00001.safetensors"])
def test_a_truncated_or_missing_file_is_seen_at_open(folder, name):
    size = (folder / name).stat().st_size
    with (folder / name).open("r+b") as file:
        file.truncate(size - 1)
    refuse(folder, name, f"{size - 1:,} bytes instead of {size:,}")
    (folder / name).unlink()
    refuse(folder, name, "missing")


@pytest.mark.parametrize("expert", [0, 5])
def test_a_bit_that_the_disk_lost_behind_the_proof_is_seen_at_first_use(folder, expert, monkeypatch):
    """Size, time and inode are as they were: only the checksum of the expert can tell."""
    monkeypatch.setattr(proof, "SMALL", 0)
    load.load(folder, Options("exact", device="cpu"))
    path = folder / experts_name(1)
    before = path.stat()
    header, start = plain_header(path)
    low, high = header["blobs"]["data_offsets"]
    at = start + low + int((expert + 0.5) * (high - low) / 8)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    experts = ExpertsFile(path)
    for other in set(range(8)) - {expert}:
        experts.verify(other)
    load.load(folder, Options("exact", device="cpu"))
    refuse(folder, "experts-00001.safetensors is damaged", f"expert {expert}", run=True)


@pytest.mark.parametrize("at", [0, 3, 9, 40])
def test_a_damaged_header(folder, at):
    path = folder / experts_name(0)
    raw = bytearray(path.read_bytes())
    raw[at] ^= 0x41
    path.write_bytes(raw)
    refuse(folder, "experts-00000.safetensors")


@pytest.mark.parametrize("name, text, word", [
    ("tokenizer.json", None, "tokenizer"), ("tokenizer.json", "", "tokenizer"), ("tokenizer.json", "{}", "tokenizer"),
    ("config.json", None, "config.json"), ("config.json", "{", "config.json"), ("config.json", "{}", "config.json"),
    ("floe.json", None, "floe.json"),
])
def test_a_missing_or_damaged_text_file(folder, name, text, word):
    as_format_1(folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text)
    refuse(folder, word)


def test_no_tokenizer_at_all(folder):
    """transformers would make an empty one of the model's usual class."""
    as_format_1(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    refuse(folder, "no tokenizer")


def test_no_folder(tmp_path):
    refuse(tmp_path / "nowhere", "no folder")
    refuse(tmp_path, "config.json")
