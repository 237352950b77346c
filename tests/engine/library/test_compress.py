"""Compression as a whole: killed and continued, a full disk, bad sources, what is said, how much memory it takes."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from engine.__main__ import main
from engine.core import MachineError, UserError
from engine.files.checkpoint import Checkpoint
from engine.files.compressed import SafetensorsWriter
from engine.files.folder_writer import PARTIAL
from engine.library.compress import compress
from engine.progress import Progress
from tests.support.architectures import config
from tests.support.folders import checkpoint, stored_experts

LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    checkpoint("qwen3_moe", folder, num_hidden_layers=LAYERS)
    return folder


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory) -> dict[str, bytes]:
    """The files of an uninterrupted run."""
    dest = tmp_path_factory.mktemp("whole") / "made"
    compress(source, dest)
    return contents(dest)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def changed(source: Path, dest: Path, **tensors) -> Path:
    """A copy of a checkpoint with some tensors replaced or added."""
    shutil.copytree(source, dest)
    save_file(load_file(source / "model.safetensors") | tensors, dest / "model.safetensors", {"format": "pt"})
    return dest


def one_sentence(error: BaseException) -> str:
    text = str(error)
    assert text.endswith(".") and "\n" not in text and len(text) < 400, text
    return text


# --- killed and started again ----------------------------------------------------------------------------------------
# One process imports torch once; a fork of it per point kills itself (SIGKILL) before its n-th call of the function.
KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
import engine.library.compress, engine.files.compressed
source, dest = sys.argv[1:3]
engine.library.compress.compress(source, dest, device="cpu")

def killing(function, n):
    calls = [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] > n:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

for point in sys.argv[3:]:
    name, n = point.split(":")
    if os.fork() == 0:
        place = {"replace": os, "fsync": os, "write": engine.files.compressed.SafetensorsWriter}[name]
        setattr(place, name, killing(getattr(place, name), int(n)))
        engine.library.compress.compress(source, f"{dest}-{point}", device="cpu")
        os._exit(0)
    assert os.wait()[1] == signal.SIGKILL, point
"""
# Before anything; inside layers 0 and 1; between a whole layer and its entry; in the trunk; before the manifest.
POINTS = ["replace:0", "write:3", "write:13", "replace:4", "fsync:1", "write:35", "replace:9", "replace:10"]


@pytest.fixture(scope="module")
def killed(source, tmp_path_factory) -> Path:
    """The common beginning of the folders that the killed runs left."""
    base = tmp_path_factory.mktemp("killed") / "made"
    subprocess.run([sys.executable, "-c", KILLED, str(source), str(base), *POINTS], check=True, timeout=300,
                   env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=Path(__file__).resolve().parents[3])
    return base


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_it_continues_to_the_same_bytes(point, source, killed, whole, tmp_path):
    dest = shutil.copytree(f"{killed}-{point}", tmp_path / "made")
    before = contents(dest)
    assert before != whole and "floe.json" not in before
    for name in before:  # what has its name is whole, and only that
        assert name.endswith(".part") or name == PARTIAL or before[name] == whole[name]
    entries = json.loads(before.get(PARTIAL, b'{"files": []}'))["files"]
    done = {entry["path"]: (dest / entry["path"]).stat().st_ino for entry in entries}
    compress(source, dest)
    assert contents(dest) == whole
    assert {name: (dest / name).stat().st_ino for name in done} == done, "whole files were written again"


def test_the_points_lie_in_different_places(killed):
    finished = {len(json.loads(Path(f"{killed}-{point}", PARTIAL).read_text())["files"]) for point in POINTS[1:]}
    assert finished == {0, 1, LAYERS, LAYERS + 1}


def test_a_file_cut_short_meanwhile_is_made_again(source, killed, whole, tmp_path):
    dest = shutil.copytree(f"{killed}-replace:10", tmp_path / "made")
    with (dest / "experts-00001.safetensors").open("r+b") as file:
        file.truncate(1000)
    (dest / "trunk.safetensors").unlink()
    compress(source, dest)
    assert contents(dest) == whole


def test_begun_with_other_settings(source, killed, tmp_path):
    dest = shutil.copytree(f"{killed}-write:13", tmp_path / "made")
    before = contents(dest)
    with pytest.raises(UserError, match="other settings") as caught:
        compress(source, dest, trunk_bits=8)
    one_sentence(caught.value)
    with pytest.raises(UserError, match="other settings"):
        compress(shutil.copytree(source, tmp_path / "elsewhere"), dest)
    assert contents(dest) == before
    (dest / PARTIAL).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        compress(source, dest)


# --- refused ---------------------------------------------------------------------------------------------------------
def test_folders_in_use_are_left_alone(source, whole, tmp_path):
    in_use = tmp_path / "in use"
    in_use.mkdir()
    (in_use / "letter.txt").write_text("Dear")
    compress(source, tmp_path / "made")
    (tmp_path / "a file").write_text("")
    for dest, words in ((tmp_path / "made", "already holds"), (in_use, "not empty"), (source, "not empty"),
                        (tmp_path / "a file", "cannot be"), (tmp_path / "a file" / "below", "cannot be written")):
        before = contents(dest) if dest.is_dir() else None
        with pytest.raises(UserError, match=words) as caught:
            compress(source, dest)
        one_sentence(caught.value)
        assert (contents(dest) if dest.is_dir() else None) == before
    assert contents(tmp_path / "made") == whole


def test_group_sizes(source, tmp_path):
    with pytest.raises(UserError, match="group size 128 does not divide hidden size 64"):
        compress(source, tmp_path / "128", group_size=128)
    assert not (tmp_path / "128").exists()
    checkpoint("mixtral", tmp_path / "larger", hidden_size=128, num_hidden_layers=1)
    errors = {}
    for group in (None, 64, 128):
        manifest = compress(tmp_path / "larger", tmp_path / str(group), group_size=group)
        assert manifest.group_size == (group or 128)
        expected = Checkpoint.open(tmp_path / "larger").read_layer(0)
        gate, up, down = stored_experts(tmp_path / str(group), 0)
        errors[group] = [float((a - b).norm() / b.norm()) for a, b in
                         ((gate, expected.gate), (up, expected.up), (down, expected.down))]
    assert errors[64] < errors[128] == errors[None] and max(errors[128]) < 0.13


@pytest.mark.parametrize("hidden, padded", [(320, 512), (192, 256)])
def test_hidden_sizes_between(hidden, padded, tmp_path):
    checkpoint("mixtral", tmp_path / "source", hidden_size=hidden, num_hidden_layers=1)
    manifest = compress(tmp_path / "source", tmp_path / "made")
    assert (manifest.group_size, manifest.layout.padded) == (64, padded)
    expected = Checkpoint.open(tmp_path / "source").read_layer(0)
    for found, wanted in zip(stored_experts(tmp_path / "made", 0), (expected.gate, expected.up, expected.down),
                             strict=True):
        assert found.shape == wanted.shape and (found - wanted).norm() < 0.12 * wanted.norm()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite(source, value, tmp_path):
    names = load_file(source / "model.safetensors")
    key = next(name for name in names if "layers.1" in name and "experts.5" in name and "down" in name)
    bad = names[key].clone()
    bad[3, 4] = value
    with pytest.raises(UserError, match="Expert 5 of MoE layer 00001.*not finite") as caught:
        compress(changed(source, tmp_path / "bad", **{key: bad}), tmp_path / "made")
    one_sentence(caught.value)
    assert {path.name for path in (tmp_path / "made").iterdir()} == {PARTIAL, "experts-00000.safetensors"}


def test_a_trunk_that_is_not_finite(tmp_path):
    checkpoint("qwen3_moe", tmp_path / "source", hidden_size=256, num_hidden_layers=1)
    head = load_file(tmp_path / "source" / "model.safetensors")["lm_head.weight"].clone()
    head[7, 8] = float("nan")
    bad = changed(tmp_path / "source", tmp_path / "bad", **{"lm_head.weight": head})
    with pytest.raises(UserError, match="lm_head.weight.*not finite"):
        compress(bad, tmp_path / "made", trunk_bits=8)


# --- what is said ----------------------------------------------------------------------------------------------------
def test_the_verb(source, whole, tmp_path, capsys):
    vision = torch.ones(2, 4, 4)
    prediction = torch.arange(12.0).reshape(3, 4)
    composite = changed(source, tmp_path / "composite", **{
        "model.visual.blocks.0.weight": vision[0].clone(), "model.visual.blocks.1.weight": vision[1].clone(),
        "mtp.layers.0.weight": prediction})
    code = main(["compress", str(composite), str(tmp_path / "made"), "--json", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert code == 0 and out.count("\n") == 1 and out.endswith("\n")
    document = json.loads(out)
    assert (document["layers"], document["group_size"], document["trunk_bits"]) == (LAYERS, 64, 16)
    files = json.loads((tmp_path / "made" / "floe.json").read_text())["files"]
    assert document["bytes"] == sum(entry["bytes"] for entry in files)
    left_out = next(line for line in err.splitlines() if "Left out" in line)
    assert "model.visual" in left_out and "2 tensors" in left_out and "mtp" not in left_out
    made = contents(tmp_path / "made")
    assert torch.equal(load_file(tmp_path / "made" / "mtp.safetensors")["mtp.layers.0.weight"], prediction)
    assert made["trunk.safetensors"] == whole["trunk.safetensors"]
    assert [line.split("  ")[0] for line in err.splitlines() if line.startswith("layer")] == [
        f"layer {n}/{LAYERS + 1}" for n in range(1, LAYERS + 2)]
    assert all("M weights/s" in line and line.endswith("s left") for line in err.splitlines() if line[:5] == "layer")


def test_the_verb_refuses_in_one_sentence(source, tmp_path, capsys):
    dest = tmp_path / "x"
    for arguments, word in (([tmp_path, dest], "config.json"), ([source, source], "empty"),
                            ([source, dest, "--group-size", "128"], "group size")):
        assert main(["compress", *map(str, arguments), "--json"]) == 2
        out, err = capsys.readouterr()
        *warned, refused = err.splitlines()
        assert out == "" and word in refused
        assert all(line.startswith("Beforehand: ") and "chat template" in line for line in warned)


def test_progress_counts_only_its_own_work(source, tmp_path):
    seen: list[Progress] = []
    compress(source, tmp_path / "made", report=seen.append)
    assert [(p.done_bytes, p.total_bytes) for p in seen] == [(n, LAYERS + 1) for n in range(1, LAYERS + 2)]
    assert all(p.bytes_per_second > 0 for p in seen) and seen[-1].seconds_left == 0
    assert seen[0].seconds_left > 0


# --- a full disk -----------------------------------------------------------------------------------------------------
@pytest.fixture
def small_disk(tmp_path):
    """A file system in memory whose size a test may set."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(kilobytes: int) -> Path:
        mounted = os.path.ismount(place)
        options = f"{'remount,' if mounted else ''}size={kilobytes}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        if done.returncode:
            pytest.skip("needs the right to mount a file system in memory")
        return place

    yield size
    subprocess.run(["umount", str(place)], capture_output=True)


@pytest.mark.parametrize("kilobytes", [100, 500, 680, 850])
def test_a_full_disk_keeps_what_is_whole_and_goes_on(kilobytes, source, whole, small_disk, capsys):
    total = sum(map(len, whole.values())) // 1024
    dest = small_disk(kilobytes) / "made"
    assert kilobytes < total
    with pytest.raises(MachineError, match="disk is full") as caught:
        compress(source, dest)
    one_sentence(caught.value)
    left = contents(dest)
    assert all(name == PARTIAL or left[name] == whole[name] for name in left), "something half-written stays"
    assert main(["compress", str(source), str(dest)]) == 3
    assert "disk is full" in capsys.readouterr().err
    small_disk(2 * total)
    compress(source, dest)
    assert contents(dest) == whole


# --- memory ----------------------------------------------------------------------------------------------------------
BIG = dict(hidden_size=2048, moe_intermediate_size=1024, intermediate_size=1024, num_experts=4, num_hidden_layers=4,
           vocab_size=262144, head_dim=64, num_attention_heads=16, num_key_value_heads=4, tie_word_embeddings=False)


def big_checkpoint(folder: Path) -> int:
    """At least 4 GiB in bfloat16, written tensor by tensor; returns the bytes of one layer's experts.

    Embedding and head are 1 GiB each, four layers of experts 48 MiB each, and the prediction layers the rest: few
    weights for the quantiser, and single tensors larger than any layer.
    """
    folder.mkdir()
    settings = config("qwen3_moe", **BIG)
    settings.architectures, settings.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    settings.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
    with SafetensorsWriter(folder / "model.safetensors", 400) as writer:
        def add(name: str, *shape: int) -> None:
            writer.begin(name, torch.bfloat16, shape)
            left = torch.Size(shape).numel()
            while left:
                writer.write(block[:min(left, len(block))])
                left -= min(left, len(block))

        from transformers import AutoModelForCausalLM
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(settings)
        for name, value in skeleton.state_dict().items():
            if ".experts." not in name:
                add(name, *value.shape)
        for layer in range(BIG["num_hidden_layers"]):
            for e in range(BIG["num_experts"]):
                for matrix, shape in (("gate", (1024, 2048)), ("up", (1024, 2048)), ("down", (2048, 1024))):
                    add(f"model.layers.{layer}.mlp.experts.{e}.{matrix}_proj.weight", *shape)
        add("mtp.layers.0.weight", 15 << 16, 1024)
    return 3 * BIG["num_experts"] * 1024 * 2048 * 2


def anonymous_bytes(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
def test_memory_does_not_grow_with_the_checkpoint(tmp_path):
    source, dest = tmp_path / "source", tmp_path / "made"
    try:
        layer_bytes = big_checkpoint(source)
        assert (source / "model.safetensors").stat().st_size >= 4 << 30
        child = subprocess.Popen([sys.executable, "-m", "engine", "compress", str(source), str(dest), "--trunk-bits",
                                  "8", "--device", "cpu"], stderr=subprocess.PIPE,
                                 cwd=Path(__file__).resolve().parents[3])
        peak = 0
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.02)
        assert child.returncode == 0, child.stderr.read().decode()
        assert (1 << 27) < peak <= 3 * layer_bytes + (1 << 30), f"{peak / 2**30:.2f} GiB"
        with safe_open(str(dest / "trunk.safetensors"), "pt") as trunk:
            assert trunk.get_slice("lm_head.weight:codes").get_shape() == [262144, 2048]
        print(f"peak {peak / 2**20:.0f} MiB of anonymous memory, a layer's experts are {layer_bytes / 2**20:.0f} MiB")
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(dest, ignore_errors=True)
