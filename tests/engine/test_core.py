"""The nouns that everything shares, checked at birth; and where a user's files live."""
from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from engine.core import END_REASONS, EVENT_KINDS, LEVELS, Counters, Event, ModelSpec, Options, Sampling, UserError
from engine.paths import choose_models_dir, data_dir, models_dir, models_dirs


def test_the_fields_are_those_that_callers_rest_on():
    assert asdict(Options()) == dict(level=None, near_bytes=None, context=None, chunk=None, device=None,
                                     predict=True, policies="")
    assert asdict(Sampling()) == dict(temperature=None, top_k=None, top_p=None, min_p=None, repetition_penalty=None,
                                      seed=None, max_tokens=None, stop=())
    assert [f.name for f in fields(Event)] == ["kind", "text", "n_tokens", "tokens_per_second", "counters", "reason",
                                               "likely", "piece", "calls", "lossy", "picks"]
    assert [f.name for f in fields(Counters)] == ["needed_bytes", "hit_bytes", "far_bytes", "speculative_bytes",
                                                  "wasted_bytes", "dropped_weight"]
    assert LEVELS == ("full", "exact", "quality", "balanced", "fast", "floe")
    assert EVENT_KINDS == ("loading", "prefill", "thinking", "answer", "end")
    assert END_REASONS == ("stop", "length", "stopped", "error")
    with pytest.raises(FrozenInstanceError):
        Options().level = "fast"


@pytest.mark.parametrize("wrong", [
    dict(level="best"), dict(device="tpu"), dict(near_bytes=-1), dict(near_bytes=1.5), dict(context=0), dict(chunk=0),
    dict(chunk="8"), dict(context=True)])
def test_options_that_cannot_be(wrong):
    with pytest.raises(UserError) as caught:
        Options(**wrong)
    assert str(caught.value).endswith(".") and str(*wrong) in str(caught.value)


@pytest.mark.parametrize("wrong", [
    dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(temperature="hot"),
    dict(top_k=-1), dict(top_k=1.0), dict(top_p=0.0), dict(top_p=1.1), dict(min_p=-0.1), dict(repetition_penalty=0),
    dict(seed=-1), dict(seed=2**63), dict(max_tokens=0), dict(max_tokens=True)])
def test_sampling_that_cannot_be(wrong):
    with pytest.raises(UserError) as caught:
        Sampling(**wrong)
    name, value = next(iter(wrong.items()))
    said, shown = str(caught.value), name.replace("_", " ").replace("max", "max response")
    assert said.lower().replace("-", " ").startswith(f"{shown} must be ")
    assert said.endswith(f", not {value!r}.") and ".0–" not in said


def test_stop_texts_are_texts():
    assert Sampling(stop=["a", "b"]).stop == ("a", "b")
    for wrong in (("",), (3,)):
        with pytest.raises(UserError, match="non-empty strings"):
            Sampling(stop=wrong)


@pytest.mark.parametrize("wrong", [
    dict(kind="thought"), dict(kind="end"), dict(kind="end", reason="done"), dict(kind="answer", reason="stop")])
def test_an_event_has_a_kind_and_only_an_end_has_a_reason(wrong):
    with pytest.raises(AssertionError):
        Event(**wrong)


def test_counters_add_up():
    before, now = Counters(10, 4, 6, 2, 1), Counters(30, 19, 11, 5, 1, 0.5)
    assert now - before == Counters(20, 15, 5, 3, 0, 0.5) and before + (now - before) == now
    assert now.hit_rate == 19 / 30 and Counters().hit_rate == 0


def test_a_model_of_impossible_numbers_is_refused():
    good = dict(name="m", layers=2, experts=4, top_k=2, neurons=8, hidden=64, decoder_layers=3, vocabulary=128,
                trunk_params=1000, kv_bytes_per_token=4, state_bytes=0, context=64, embedding_params=100)
    spec = ModelSpec(**good)
    assert (spec.expert_params, spec.n_experts_total) == (3 * 8 * 64, 8)
    assert spec.active_params == 900 + 2 * 2 * spec.expert_params
    for wrong in (dict(layers=0), dict(top_k=5), dict(embedding_params=1001), dict(state_bytes=-1)):
        with pytest.raises(UserError, match="^m: "):
            ModelSpec(**good | wrong)


def test_the_data_folder(tmp_path, monkeypatch):
    """--data beats FLOECHAT_HOME beats the platform's own place."""
    monkeypatch.setenv("FLOECHAT_HOME", str(tmp_path / "home"))
    for given, expected in ((None, "home"), (tmp_path / "given", "given")):
        assert data_dir(given) == tmp_path / expected
        assert {path.name for path in (tmp_path / expected).iterdir()} == {"models", "logs", "cache"}
    monkeypatch.delenv("FLOECHAT_HOME")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert data_dir() == tmp_path / "xdg" / "floechat"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert data_dir() == tmp_path / "local" / "Floe Chat"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another with --data"):
        data_dir(tmp_path / "file")


def test_models_on_another_disk(tmp_path):
    """Chosen for new models; those that are there stay and are found; a disk that is not connected is said."""
    data, disk = tmp_path / "data", tmp_path / "disk"
    assert models_dirs(data) == [models_dir(data)] == [data / "models"]
    assert choose_models_dir(str(disk), data) == disk == models_dir(data)
    assert models_dirs(data) == [disk, data / "models"]
    disk.rmdir()
    with pytest.raises(UserError, match="is not there; connect its disk"):
        models_dir(data)
    assert choose_models_dir(str(data / "models"), data) == models_dir(data) == data / "models"
    assert models_dirs(data) == [data / "models", disk]
    choose_models_dir(str(disk), data)
    assert models_dirs(data) == [disk, data / "models"]
    (data / "models-folders").write_bytes(b"\xff\xfe")
    assert models_dirs(data) == [data / "models"]
    (tmp_path / "file").write_text("")
    for wrong, said in (("disk", "no whole path"), (str(tmp_path / "file"), "cannot be kept in"),
                        (str(tmp_path / "none" / "below"), "cannot be kept in")):
        with pytest.raises(UserError, match=said):
            choose_models_dir(wrong, data)
    assert choose_models_dir(" ", data) == data / "models"


def test_a_window_holds_no_more_tokens_than_there_are():
    spec = ModelSpec("m", layers=1, experts=2, top_k=1, neurons=8, hidden=64, decoder_layers=1, vocabulary=9,
                     trunk_params=9, kv_bytes_per_token=0, state_bytes=1000 + 10 * 4096, context=8192,
                     windows=((4096, 10),))
    assert [spec.state_bytes_at(context) for context in (1, 512, 4096, 8192)] == [1010, 6120, 41960, 41960]
