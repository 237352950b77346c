"""LongCat-Flash (ScMoE, arXiv 2404.05019): experts that are chosen early in a block and added at its end, some of which
give back what they are given and move no byte. Small random models of transformers' own class.
"""
from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from engine.core import Machine, Options, Sampling, UserError
from engine.decode.decoder import decoder_for
from engine.experts.layer import LevelPlan
from engine.experts.policy_hook import choose_policies
from engine.experts.runtime import Runtime
from engine.files.checkpoint import Checkpoint
from engine.files.skeleton import experts_modules, spec_of_folder
from engine.library.compress import compress
from engine.model.load import load
from engine.planning.plan import PlanRequest
from engine.planning.planner import plan
from engine.policies.choice import parse
from engine.policies.usage import of_trace
from engine.quality.recorder import Recorder
from engine.quality.simulate import Simulator
from engine.quality.specialists.mixed_model import Source
from tests.support.architectures import build
from tests.support.folders import compressed, logits_by_steps, put_experts, stored_experts, write_tokenizer

NAME = "longcat_flash"
TOKENS = torch.randint(3, 128, (16,), generator=torch.Generator().manual_seed(1))
N_PREFILL = 9
N_STEPS = len(TOKENS) - N_PREFILL


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """transformers' model at the decoded weights, its checkpoint and its compressed folder."""
    model, source, folder = compressed(NAME, tmp_path_factory.mktemp("longcat"))
    for layer, module in enumerate(experts_modules(model, NAME).values()):
        put_experts(module, *stored_experts(folder, layer))
    return model, source, folder


def opened(folder, share: float = 1.0, level: str = "exact"):
    """With near memory for that share of the experts."""
    loaded = load(folder, Options(device="cpu"))
    runtime = loaded.runtime
    n = runtime.top_k * runtime.far.neurons
    runtime.plans["balanced"] = LevelPlan(((n // 3, n // 3),) * runtime.far.layers)
    runtime.set_level(level)
    if share < 1.0:
        runtime.set_level(level, max(runtime.smallest_bytes(), int(share * runtime.everything_bytes())))
    return loaded


def run(model) -> torch.Tensor:
    return logits_by_steps(model, TOKENS, N_PREFILL)


@contextmanager
def eager():
    """Experts are fetched and computed where they are chosen."""
    begin = Runtime.begin
    with pytest.MonkeyPatch.context() as patch:
        def at_once(self, *given):
            out = begin(self, *given)()
            return lambda: out
        patch.setattr(Runtime, "begin", at_once)
        yield


def picks(model) -> list[torch.Tensor]:
    """Of every layer and step of a run with transformers' own routers: ids int64 [k]."""
    found, handles = [], []
    for module in experts_modules(model, NAME).values():
        handles.append(module.register_forward_pre_hook(
            lambda module, given: found.append(given[1][0].clone()) if len(given[1]) == 1 else None))
    run(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_joined_late_is_eager_bit_for_bit(made, level, share):
    loaded = opened(made[2], share, level)
    late, counted = run(loaded.model), loaded.runtime.counters()
    loaded.runtime.set_level(level, loaded.runtime.near_wish)
    before = loaded.runtime.counters()
    with eager():
        early = run(loaded.model)
    assert torch.equal(late, early)
    if share < 1.0:
        assert loaded.runtime.counters() - before == counted and counted.far_bytes > 0


def test_only_picks_with_weights_are_counted(made):
    model, _, folder = made
    loaded = opened(folder, 0.6)
    runtime, chosen = loaded.runtime, picks(model)
    run(loaded.model)
    real = sum(int((ids < runtime.far.experts).sum()) for ids in chosen)
    assert 0 < real < sum(map(len, chosen)) and len(chosen) == N_STEPS * runtime.far.layers
    assert runtime.counters().needed_bytes == real * runtime.far.expert_bytes
    assert float(runtime.picks[1, :-1].sum()) == real and float(runtime.picks[1, -1]) == N_STEPS


@pytest.mark.parametrize("level", ["exact", "balanced"])
@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_token_of_identities_alone_moves_no_byte(made, level, share):
    loaded = opened(made[2], share, level)
    runtime, module = loaded.runtime, loaded.model.model.layers[0].mlp.experts
    runtime.phase = "decode"
    x = torch.randn(1, runtime.far.hidden, generator=torch.Generator().manual_seed(2))
    weights = torch.tensor([[1.5, 0.25, 0.75]])
    with torch.inference_mode():
        zeros = module(x, torch.tensor([[8, 6, 7]]), weights)
        out = module.added_to(zeros)
    assert not zeros.any() and torch.equal(out, weights.sum() * x)
    assert runtime.counters().needed_bytes == runtime.counters().far_bytes == 0


@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_all_that_is_needed_was_asked_for_at_the_gate(made, level, monkeypatch):
    """The early router as a predictor: recall 100 %, nothing in vain, and nothing is read before it has come."""
    loaded = opened(made[2], 0.6, level)
    with eager():
        expected = run(loaded.model)
    loaded.runtime.set_level(level, loaded.runtime.near_wish)
    loaded.runtime._side, asked, begin = LastMoment(), [], Runtime.begin

    def watched(self, *given):
        rest, at_gate = begin(self, *given), self.counters()

        def ended():
            out = rest()
            asked.append((at_gate, self.counters()))
            return out
        return ended
    monkeypatch.setattr(Runtime, "begin", watched)
    found = run(loaded.model)
    assert torch.equal(found, expected) and loaded.runtime._side.n_held > 0
    assert len(asked) == (1 + N_STEPS) * loaded.runtime.far.layers and asked[-1][1].far_bytes > 0
    assert all(at_gate == at_end for at_gate, at_end in asked)
    assert asked[-1][1].speculative_bytes == asked[-1][1].wasted_bytes == 0


class LastMoment:
    """A side that does its work when it is waited for, and no sooner."""

    def __init__(self) -> None:
        self.work, self.n_held = None, 0

    def run(self, work, *tensors) -> None:
        self.join()
        self.work, self.n_held = work, self.n_held + 1

    def join(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work()


def test_what_nobody_asks_for_is_fetched_where_it_is_chosen(made):
    """predict=False: the main thread fetches; the order of the sums stays."""
    loaded = opened(made[2], 0.6)
    expected = run(loaded.model)
    loaded.runtime.set_level("exact", loaded.runtime.near_wish)
    loaded.runtime.predict, loaded.runtime._side = False, LastMoment()
    assert torch.equal(run(loaded.model), expected) and loaded.runtime._side.n_held == 0


def test_the_choice_alone_is_biased(tmp_path):
    """A correction that lifts the identities: every pick is one, its weight is the softmax times the factor, and an
    answer moves no byte."""
    model = build(NAME)
    for layer in model.model.layers:
        layer.mlp.router.e_score_correction_bias[:] = 0.0
        layer.mlp.router.e_score_correction_bias[6:] = 5.0
    model.save_pretrained(tmp_path / "source")
    write_tokenizer(tmp_path / "source")
    compress(tmp_path / "source", tmp_path / "made", device="cpu")
    loaded = load(tmp_path / "made", Options("exact", device="cpu"))
    router, x = loaded.model.model.layers[0].mlp.router, torch.randn(1, 64)
    logits, weights, ids = router(x)
    assert sorted(ids[0].tolist()) == [6, 7, 8]
    torch.testing.assert_close(weights, 2.5 * logits.softmax(-1).gather(1, ids))
    found, expected = run(loaded.model), run(model)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert loaded.runtime.counters().needed_bytes == loaded.runtime.prefill_far_bytes == 0


def test_a_checkpoint_without_rows_of_identities_and_with_a_predictor_of_more_tokens(made, tmp_path):
    """As the published one: what nobody reads is not there, what is not run yet is kept apart."""
    model, source, folder = made
    (tmp_path / "source").mkdir()
    for file in source.iterdir():
        (tmp_path / "source" / file.name).write_bytes(file.read_bytes())
    weights = {name: tensor for name, tensor in load_file(source / "model.safetensors").items()
               if not any(f".experts.{identity}." in name for identity in (6, 7, 8))}
    weights["model.mtp.layers.0.eh_proj.weight"] = torch.zeros(64, 128)
    save_file(weights, tmp_path / "source" / "model.safetensors", {"format": "pt"})
    read = Checkpoint.open(tmp_path / "source")
    assert read.map.mtp == ["model.mtp.layers.0.eh_proj.weight"] and read.left_out == []
    assert Checkpoint.open(source).left_out == []
    compress(tmp_path / "source", tmp_path / "made", trunk_bits=16, device="cpu")
    expected = run(load(folder, Options("exact", device="cpu")).model)
    assert torch.equal(run(load(tmp_path / "made", Options("exact", device="cpu")).model), expected)


@pytest.mark.parametrize("level", ["exact", "balanced"])
def test_a_replayed_trace_counts_what_the_engine_counted(made, level):
    loaded = opened(made[2], 0.6, level)
    runtime, cache, recorder = loaded.runtime, DynamicCache(), Recorder(loaded, horizon=0)
    with runtime.hooked(recorder), recorder.watching(), torch.inference_mode():
        for part, runtime.phase in ((TOKENS[:N_PREFILL], "prefill"), *((token[None], "decode") for token in
                                                                      TOKENS[N_PREFILL:])):
            loaded.model(part[None], past_key_values=cache)
    trace = recorder.trace("longcat")
    found = Simulator(trace, runtime.near_wish).run_choice(parse("predict=none"))
    counted = runtime.counters()
    assert [*vars(found.counters).values()][:5] == [*vars(counted).values()][:5] and counted.far_bytes > 0
    usage = of_trace(trace)
    assert 0 < usage.hard.sum() == (trace.weights != 0).sum() < trace.weights.size


def test_an_answer_is_transformers_own(made):
    """Two attentions a block, so twice as many layers in the cache as blocks; a second answer goes back in it."""
    model, _, folder = made
    loaded = opened(folder, 0.6)
    decoder = decoder_for(loaded.model, loaded.runtime, 64)
    for prompt in (TOKENS[:9], TOKENS[:5], TOKENS):
        with torch.inference_mode():
            decoder.prefix.reuse(prompt.tolist())
            drawn = decoder.tokens(prompt.tolist(), Sampling(temperature=0), None, frozenset(), 8)
            found = [each.token for each in drawn]
        expected = model.generate(prompt[None], max_new_tokens=8, min_new_tokens=8, do_sample=False)
        assert found == expected[0, len(prompt):].tolist()


@pytest.mark.parametrize("policies", ["predict=repeat,evict=lfu", "free=layer,admit=third,miss=place"])
def test_policies_without_loss_change_nothing(made, policies):
    loaded = opened(made[2], 0.6)
    expected = run(loaded.model)
    choose_policies(loaded.runtime, loaded.model, policies)
    torch.testing.assert_close(run(loaded.model), expected, rtol=1e-5, atol=1e-5)


def test_a_predictor_remembers_picks_with_weights_alone(made):
    model, _, folder = made
    loaded = opened(folder, 0.6)
    choose_policies(loaded.runtime, loaded.model, "predict=popularity:0")
    experts, predictor = loaded.runtime.far.experts, loaded.runtime.hook.guesses.predictor
    run(loaded.model)
    wanted = torch.zeros_like(predictor.scores)
    for at, ids in enumerate(picks(model)):
        wanted[at % len(wanted)].index_add_(0, ids[ids < experts], torch.ones(int((ids < experts).sum())))
    assert torch.equal(predictor.scores, wanted) and 0 < wanted.sum() < N_STEPS * wanted.shape[0] * 3


def test_gradients_go_through_the_experts_and_the_identities(made):
    model, _, folder = made
    ours = opened(folder).model
    found, expected = (gradient(each) for each in (ours, model))
    assert (found - expected).abs().max() < 5e-3 * expected.abs().max()


def gradient(model) -> torch.Tensor:
    """Of a sum of logits after the prompt, in its embedded tokens."""
    embedded = model.get_input_embeddings()(TOKENS[None]).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    return torch.autograd.grad(logits[0, -1, :64].sum(), embedded)[0]


def test_no_specialist_is_made_of_it(made):
    with pytest.raises(UserError, match="no row for each expert"):
        Source(made[2])


PUBLISHED = dict(
    model_type="longcat_flash", architectures=["LongcatFlashForCausalLM"], vocab_size=131072, hidden_size=6144,
    num_layers=28, num_attention_heads=64, max_position_embeddings=131072, ffn_hidden_size=12288, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, moe_topk=12, n_routed_experts=512,
    zero_expert_num=256, zero_expert_type="identity", expert_ffn_hidden_size=2048, routed_scaling_factor=6.0,
    rms_norm_eps=1e-5, rope_theta=1e7)


def test_the_plan_of_the_published_model(tmp_path):
    """560 billion weights of which a token takes 27 (arXiv 2509.01322), as identities stand for a third of its picks;
    two attentions of 576 numbers a layer."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    spec = spec_of_folder(tmp_path, "LongCat-Flash")
    assert (spec.layers, spec.decoder_layers, spec.experts, spec.identities, spec.top_k) == (28, 28, 512, 256, 12)
    assert spec.picks == 8 and spec.kv_bytes_per_token == 2 * 28 * 576 * 2
    assert round((spec.trunk_params + spec.n_experts_total * spec.expert_params) / 1e9) == 561
    assert round(spec.active_params / 1e9) == 27
    machine = Machine("m", 24 * 10**9, 20 * 10**9, 10**12, 10**10)
    planned = plan(spec, machine, PlanRequest("exact"))
    assert planned.verdict == "no" and planned.disk_bytes > 300 * 10**9
    as_if_all_had_weights = plan(replace(spec, identities=0), machine, PlanRequest("exact"))
    assert planned.far_bytes_per_token == pytest.approx(2 / 3 * as_if_all_had_weights.far_bytes_per_token, rel=1e-3)


def test_n_gram_tables_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED | {"ngram_vocab_size_ratio": 78, "emb_split_num": 4}))
    with pytest.raises(UserError, match=r"n-gram tables \(LongCat-Flash-Lite\)") as caught:
        spec_of_folder(tmp_path, "Lite")
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
