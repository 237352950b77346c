"""What the machine is, seen through a stand-in for NVIDIA's library that answers, errs, crashes and hangs."""
from __future__ import annotations

import json
import os
import sys

import pytest

from engine.__main__ import main
from engine.core import Machine, UserError
from engine.machine import benchmark, detect, nvml, table
from engine.units import parse_bytes
from tests.support import fake_driver
from tests.support.fake_driver import RTX_3060

RTX_2080 = "NVIDIA GeForce RTX 2080 Ti|7.5|11264|4000|3|16|3|16|7000|352"
GTX_1080 = "NVIDIA GeForce GTX 1080 Ti|6.1|11264|11000|3|16|3|16|5505|352"
UNKNOWN = "NVIDIA Something New|12.1|16384|16000|5|8|5|8|14001|256"
INTEGRATED = "NVIDIA Integrated|8.7|-|0|0|0|0|0|0|0"
library, driver = fake_driver.library, fake_driver.driver
KEYS = {"name", "compute_capability", "vram_total_bytes", "vram_free_bytes", "pcie_generation", "pcie_width",
        "pcie_generation_max", "pcie_width_max", "driver"}


def test_one_card(driver):
    driver(RTX_3060)
    found = detect.survey()
    gpu = found.gpu
    assert (gpu.name, gpu.compute_capability, gpu.driver) == ("NVIDIA GeForce RTX 3060", "8.6", "580.95.05")
    assert (gpu.vram_total_bytes, gpu.vram_free_bytes) == (12288 * 2**20, 11900 * 2**20)
    assert (gpu.pcie_generation, gpu.pcie_generation_max, gpu.pcie_width_max) == (1, 4, 16)
    assert gpu.memory_bytes_per_second == pytest.approx(360e9, rel=1e-3)
    machine = detect.machine(found)
    assert machine.device == "cuda" and machine.compute_capability == "8.6"
    assert machine.link_bytes_per_second == pytest.approx(25.2e9)      # generation 4, although idle at 1
    assert machine.vram_bytes_per_second == pytest.approx(0.88 * 360e9)
    assert machine.flops_per_second == 25.6e12                         # from the table
    assert found.notes == ()


def test_a_card_that_no_table_knows(driver):
    driver(UNKNOWN)
    machine = detect.machine(detect.survey())
    assert machine.vram_bytes_per_second == pytest.approx(0.88 * 2 * 14001e6 * 256 / 8)
    assert machine.flops_per_second > 30e12
    assert machine.link_bytes_per_second == pytest.approx(8 * 3.19e9)


def test_several_cards_and_one_half_used(driver):
    driver(GTX_1080, RTX_2080, RTX_3060)
    found = detect.survey()
    assert found.gpu.name.endswith("3060") and len(found.gpus) == 3
    text = " ".join(found.notes)
    assert "There are 3 cards" in text and "CUDA_VISIBLE_DEVICES" in text
    assert "compute capability 6.1" in text
    driver(RTX_2080)
    found = detect.survey()
    assert "Other programs use 7.6 GB" in " ".join(found.notes)
    assert detect.machine(found).vram_free_bytes == 4000 * 2**20


def test_cuda_takes_the_card_that_is_planned_for(driver, monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    driver(GTX_1080, RTX_2080, RTX_3060)
    found = detect.survey()
    detect.choose_card(found)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == found.gpu.uuid == "GPU-2-fake"
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert [gpu.index for gpu in detect.survey().gpus] == [2]  # the next look sees what CUDA sees


@pytest.mark.parametrize("wish, index", [("1", 1), ("1,2", 1), ("GPU-2", 2), ("GPU-1-fake,0", 1), ("2,7", 2),
                                         ("7", None), ("", None), ("-1", None)])
def test_a_card_that_a_person_has_chosen_is_the_one(driver, monkeypatch, wish, index):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", wish)
    driver(GTX_1080, RTX_2080, RTX_3060)
    found = detect.survey()
    detect.choose_card(found)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == wish
    assert (found.gpu.index if found.gpu else None) == index
    assert index is not None or "names no card" in " ".join(found.notes)


def test_what_this_process_holds_counts_as_free(driver):
    driver(RTX_2080)
    before, ours = detect.survey(), detect.survey(own_bytes=10**8, own_vram_bytes=7000 * 2**20)
    assert ours.gpu.vram_free_bytes == 11000 * 2**20 and not any("Other programs" in note for note in ours.notes)
    assert abs(ours.ram_free_bytes - before.ram_free_bytes - 10**8) < 5 * 10**8
    most = detect.survey(own_bytes=1 << 60, own_vram_bytes=1 << 60)
    assert most.gpu.vram_free_bytes == most.gpu.vram_total_bytes and most.ram_free_bytes == most.ram_total_bytes


@pytest.mark.parametrize("card, said", [(INTEGRATED, "no memory of its own"), (GTX_1080, "7.5 (RTX 20"),
                                        ("!15", "does not answer"), ("Odd|x|8192|8000|0|0|0|0|0|0", "unknown")])
def test_a_card_that_cannot_be_used(driver, card, said):
    driver(card)
    found = detect.survey()
    assert found.gpu is None and said in " ".join(found.notes)
    assert detect.machine(found).device == "cpu"
    with pytest.raises(UserError, match="no usable graphics card"):
        detect.machine(found, "cuda")


@pytest.mark.parametrize("fault, said", [("init:9", "not running"), ("init:18", "restart the computer"),
                                         ("init:999", "reports an error"), ("crash", "crashed with exit code"),
                                         ("hang", "does not answer"), ("late-hang", "does not answer")])
def test_a_broken_driver_is_explained_and_never_hangs(driver, fault, said):
    """That it comes back at all is asserted by its coming back: the stand-in hangs for ever."""
    driver(RTX_3060, fault=fault)
    found = detect.survey(timeout=1.0 if "hang" in fault else 120.0)
    assert found.gpus == () and said in " ".join(found.notes)
    assert found.ram_total_bytes > found.ram_free_bytes > 0


def test_no_card_behind_a_running_driver(driver):
    driver()
    assert "finds no card" in " ".join(detect.survey().notes)


def test_no_driver_and_no_package(monkeypatch):
    monkeypatch.setattr(nvml, "ask", lambda timeout: {"driver": "", "error": "no_driver", "gpus": []})
    assert "no NVIDIA driver" in detect.survey().notes[0]
    monkeypatch.setattr(nvml, "ask", lambda timeout: {"driver": "", "error": "missing_package", "gpus": []})
    assert "pip install nvidia-ml-py" in detect.survey().notes[0]


def test_the_card_can_be_refused(driver):
    driver(RTX_3060)
    assert detect.machine(detect.survey(), "cpu").device == "cpu"


def test_json_has_the_agreed_keys_and_nothing_else(driver, tmp_path, capsys):
    driver(RTX_3060, GTX_1080)
    (tmp_path / "cache").mkdir()
    found = detect.survey()
    key = benchmark._key(detect.machine(found))
    (tmp_path / "cache" / f"machine-{key}.json").write_text('{"copy_bytes_per_second": 2.4e10}')
    assert main(["hardware", "--json", "--data", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert out.count("\n") == 1
    assert set(document) == {"gpus", "ram_total_bytes", "ram_free_bytes", "disk_free_bytes", "pinned_limit_bytes",
                             "copy_bytes_per_second"}
    assert [set(gpu) for gpu in document["gpus"]] == [KEYS, KEYS]
    assert document["copy_bytes_per_second"] == 2.4e10
    assert "compute capability 6.1" in err and "24.0 GB/s" in err


def test_a_container_limit_counts(monkeypatch, tmp_path):
    files = {"/sys/fs/cgroup/memory.max": "4000000000", "/sys/fs/cgroup/memory.current": "1000000000"}
    real = detect.Path

    def path(name):
        if str(name) not in files:
            return real(name)
        (tmp_path / "f").write_text(files[str(name)])
        return tmp_path / "f"
    monkeypatch.setattr(detect, "Path", path)
    total, free = detect._memory()
    assert total == 4_000_000_000 and free <= 3_000_000_000


def test_windows_may_lock_half(monkeypatch):
    monkeypatch.setattr(detect.platform, "release", lambda: "5.15.153.1-microsoft-standard-WSL2")
    limit, why = detect._pinned_limit(32 * 2**30)
    assert limit == 16 * 2**30 and "Windows" in why


def test_described_machines():
    for name in table.rows():
        machine = table.described(name, ram=64 * 2**30)
        assert machine.ram_total_bytes == 64 * 2**30
        old = machine.compute_capability == "6.1"
        assert (machine.device == "cpu") == (name.startswith("cpu") or old)
        assert machine.gemv_bytes_per_second if machine.device == "cpu" else machine.flops_per_second
    changed = table.described("rtx-3060-12gb", vram=8 * 2**30, link=12.4e9)
    assert changed.vram_total_bytes == 8 * 2**30 and changed.link_bytes_per_second == 12.4e9
    assert table.described("RTX-3060-12GB").ram_total_bytes == 32 * 2**30
    for typed, offered in (("voodoo-2", "gtx-1080-ti-11gb, .*, cpu-ddr5"), ("rtx-2080ti-11gb", "rtx-2080-ti-11gb"),
                           ("RTX-3060", "rtx-3060-8gb, rtx-3060-12gb, ")):
        with pytest.raises(UserError, match=f"choose one of {offered}"):
            table.described(typed)


def test_overrides_that_cannot_be_are_refused():
    card, without = table.described("rtx-4070-12gb"), table.described("cpu-ddr4")
    assert table.described("rtx-4070-12gb", vram=0).vram_free_bytes == 0
    with pytest.raises(UserError, match="more than nothing"):
        table.overridden(card, link=0)
    for sizes in ({"vram": 8 * 2**30}, {"link": 5e9}):
        with pytest.raises(UserError, match="DDR4-3200 is planned without a card"):
            table.overridden(without, **sizes)
        with pytest.raises(UserError, match="GTX 1080 Ti .not used.* is planned without a card"):
            table.described("gtx-1080-ti-11gb", **sizes)


def test_overrides_change_only_what_they_name():
    base = table.described("rtx-4070-12gb")
    assert table.overridden(base) == base
    other = table.overridden(base, ram=16 * 2**30, vram=11 * 2**30, link=5e9)
    assert other.ram_total_bytes == 16 * 2**30 and other.vram_total_bytes == 11 * 2**30
    assert other.link_bytes_per_second == 5e9 and other.vram_bytes_per_second == base.vram_bytes_per_second


def test_this_machine_is_measured():
    found = benchmark.measure("cpu")
    assert set(found) == set(benchmark.RATES) and all(rate > 0 for rate in found.values())
    assert found["operation_seconds"] < 1 and found["copy_bytes_per_second"] > 1e6      # of the right kind at all


def described_as(name: str) -> Machine:
    return Machine(name=name, ram_total_bytes=2**34, ram_free_bytes=2**33, disk_free_bytes=0, pinned_limit_bytes=0)


@pytest.fixture
def speeds(monkeypatch) -> list[float]:
    """What the next measurements find, in order; one that nobody expects fails the test."""
    found: list[float] = []

    def measure(device: str, seconds: float) -> dict[str, float]:
        assert found, "measured although cached"
        return dict.fromkeys(benchmark.RATES, found.pop(0))
    monkeypatch.setattr(benchmark, "measure", measure)
    return found


def test_measured_speeds_are_cached_per_machine(tmp_path, speeds):
    machine, other = described_as("test"), described_as("other")
    speeds += [1.0, 1.1]
    measured = benchmark.with_rates(machine, tmp_path)
    assert measured.gemv_bytes_per_second == 1.1 and measured.operation_seconds == 1.0      # the faster of two
    assert benchmark.with_rates(machine, tmp_path) == measured == benchmark.with_cached(machine, tmp_path)
    assert benchmark.with_cached(other, tmp_path) == other
    speeds += [2.0, 2.0]
    assert benchmark.with_rates(other, tmp_path).gemv_bytes_per_second == 2.0
    speeds += [3.0, 3.0]
    assert benchmark.with_rates(machine, tmp_path, refresh=True).gemv_bytes_per_second == 3.0
    for damaged in ("{", "[]", '{"copy_bytes_per_second": 0}', '{"copy_bytes_per_second": "fast"}', "[" * 100_000,
                    '{"copy_bytes_per_second": Infinity}', '{"gemv_bytes_per_second": 1}', "null", "\0"):
        for path in tmp_path.glob("machine-*.json"):
            path.write_text(damaged)
        speeds += [4.0, 4.0]
        assert benchmark.with_rates(other, tmp_path).gemv_bytes_per_second == 4.0


def test_a_busy_moment_does_not_become_the_machines_speed(tmp_path, speeds):
    """Both halves are told and believed for now, the faster of them; only what they agree on is kept."""
    machine = described_as("busy")
    speeds += [0.01, 1.0]
    assert benchmark.with_rates(machine, tmp_path).gemv_bytes_per_second == 1.0
    assert list(tmp_path.iterdir()) == [] and benchmark.with_cached(machine, tmp_path) == machine
    speeds += [1.0, 1.0]
    assert benchmark.with_rates(machine, tmp_path).gemv_bytes_per_second == 1.0
    assert benchmark.with_cached(machine, tmp_path).gemv_bytes_per_second == 1.0


def test_without_torch_the_machine_stays_as_it_is(tmp_path, monkeypatch):
    machine = table.described("cpu-ddr4")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert benchmark.with_rates(machine, tmp_path) == machine


def test_sizes():
    assert parse_bytes("11GiB") == 11 * 2**30 and parse_bytes("12.5 GB") == 12_500_000_000
    assert parse_bytes("12.4GB/s") == 12_400_000_000 and parse_bytes(123) == 123 and parse_bytes("3k") == 3072
    for bad in ("", "GB", "1e9", "-3GB", "11 Gib yes"):
        with pytest.raises(UserError, match="not a size"):
            parse_bytes(bad)
