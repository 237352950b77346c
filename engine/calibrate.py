"""Finds what each level may leave out of a compressed model, and stores it in the folder.

Runs the compressed model over text: one pass collects, per layer, the output error of every budget on a grid; one
pass per layer measures how much loss that error makes; then budgets of equal marginal loss per byte are tried, each
time measuring the real loss of the whole model, until the promise is just kept on every text given. A third of the
text is held back for the figures that are stored and shown. Nothing else of the folder changes, and the manifest is
replaced atomically.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from engine.budgets import Budgets, LayerTable, cheapest, edges, record_bytes
from engine.experts import LevelPlan, Runtime
from engine.format import FileEntry, Manifest, SafetensorsWriter, file_entry
from engine.hf import Loaded, load
from engine.simulate import Decoded, Seen, Simulation
from engine.spec import PROMISES, Options, UserError
from engine.texts import read_tokens
from engine.trace import Trace, miss_curve
from kernels.select import DOWN_ONLY

Tensor = torch.Tensor
Report = Callable[[str], None]
LONGEST = 512        # tokens of a document; longer ones are divided
PROBE = 0.1          # share of a layer's neurons kept when its sensitivity is measured
TABLE_TOKENS = 1024  # tokens of each text behind the tables of errors
# Share of a promise that is spent on the fitted text. Two halves of one corpus differ by some tenths of a percent,
# which is most of a small promise and little of a large one.
SPENT = {"quality": 0.25, "balanced": 0.7, "fast": 0.95}
STEPS = 6            # trials to meet a promise
TRACE_TOKENS = 640
USAGE = "usage.safetensors"


Losses = list[float]  # mean next-token loss in nats, one per text


Documents = list[Tensor]  # int64 [1, n] each: a loss is measured from the start of a document, as in a conversation


def documents_of(path: Path, tokenizer, n_tokens: int) -> Documents:
    """The first documents of a text. UserError when there are too few to hold some back."""
    pieces = [ids for ids in read_tokens(path, tokenizer, n_tokens, LONGEST) if len(ids) > 1]
    if len(pieces) < 3:
        raise UserError(f"{path} has only {len(pieces)} documents; calibration needs at least 3, better hundreds.")
    return [torch.tensor([ids]) for ids in pieces]


class Calibration:
    """The steps, in order, over one open model. texts: the documents of every text."""

    def __init__(self, loaded: Loaded, texts: Sequence[Documents], reference=None, report: Report = print) -> None:
        self.model, self.runtime, self.reference, self.report = loaded.model, loaded.runtime, reference, report
        self.layout = self.runtime.far.layout
        self.fit = [documents[:-(len(documents) // 3)] for documents in texts]
        self.held = [documents[-(len(documents) // 3):] for documents in texts]
        self.plans: dict[str, LevelPlan] = {}
        self.tried: dict[Budgets, float] = {}
        self.trials: dict[float, float] = {}  # predicted loss -> measured
        self.decoded = Decoded(self.runtime)

    @torch.inference_mode()
    def run(self) -> tuple[dict, dict[str, Tensor]]:
        """-> the manifest's "calibration", and the usage counts."""
        self.report("exact: the loss to compare with")
        exact = self.losses(None, self.fit)
        tables = self._tables(exact)
        for level, promise in PROMISES.items():
            self.plans[level] = LevelPlan(self._budgets(level, promise, tables, exact))
        self.plans["floe"] = LevelPlan(thresholds=self._thresholds())
        levels = self._measured()
        traces, usage = self._traces()
        self.report("miss curves")
        found = {"levels": levels, "miss_curves": {name: miss_curve(trace) for name, trace in traces.items()},
                 "tokens": sum(ids.numel() for documents in self.fit for ids in documents)}
        return found, usage

    def _simulating(self, plan: LevelPlan | None, observe: Callable[[Seen], None] | None = None) -> Simulation:
        return Simulation(self.runtime, self.decoded, plan, observe)

    def losses(self, plan: LevelPlan | None, texts: Sequence[Documents]) -> Losses:
        with self._simulating(plan):
            return [_mean_loss(self.model, documents) for documents in texts]

    # --- budgets ------------------------------------------------------------------------------------------------
    def _tables(self, exact: Losses) -> list[LayerTable]:
        self.report("errors of every layer")
        errors = _Errors(self.runtime)
        with self._simulating(None, errors.see):
            for documents in self.fit:
                for ids in _some(documents, TABLE_TOKENS):
                    self.model(ids)
        bare = errors.tables()
        tables = [replace(t, loss_per_dropped=self._sensitivity(i, bare, exact)) for i, t in enumerate(bare)]
        ratio = self._coarse_ratio(tables, exact)
        return [replace(t, loss_per_coarse=t.loss_per_dropped * ratio) for t in tables]

    def _sensitivity(self, layer: int, tables: list[LayerTable], exact: Losses) -> float:
        """Loss per unit of dropped error of one layer, the others exact; noise below zero counts as very little."""
        everything = tables[layer].edges[-1]
        kept = tables[layer].nearest(PROBE)
        budgets = tuple((kept if i == layer else everything, 0) for i in range(len(tables)))
        loss = _rise(self.losses(LevelPlan(budgets), self.fit), exact)
        self.report(f"layer {layer}: {loss:+.4f} nats with {kept} of {everything} neurons")
        return max(loss, 1e-5) / max(tables[layer].loss(kept, 0), 1e-30)

    def _coarse_ratio(self, tables: list[LayerTable], exact: Losses) -> float:
        """Loss per coarse error over loss per dropped error: everything kept in all layers, a part of it coarse."""
        pairs = tuple((t.nearest(PROBE), t.edges[-1] - t.nearest(PROBE)) for t in tables)
        loss = _rise(self.losses(LevelPlan(pairs), self.fit), exact)
        weighted = sum(t.loss_per_dropped * float(t.coarse[t.edges.index(r), -1])
                       for t, (r, _) in zip(tables, pairs, strict=True))
        self.report(f"all layers: {loss:+.4f} nats with the other neurons coarse")
        return max(loss, 1e-5) / max(weighted, 1e-30)

    def _budgets(self, level: str, promise: float, tables: list[LayerTable], exact: Losses) -> Budgets:
        """The cheapest budgets tried, for any level, that keep the promise on the worst of the texts."""
        target = math.log1p(SPENT[level] * promise)
        self._search(level, tables, target, exact)
        everything = tuple((table.edges[-1], 0) for table in tables)
        good = [budgets for budgets, loss in self.tried.items() if loss <= target]
        best = min(good, key=lambda budgets: record_bytes(budgets, self.layout), default=everything)
        kept = sum(map(sum, best)) / sum(table.edges[-1] for table in tables)
        self.report(f"{level}: {kept:.0%} of the neurons, {record_bytes(best, self.layout):,} record bytes a token")
        return best

    def _search(self, level: str, tables: list[LayerTable], target: float, exact: Losses) -> None:
        """Narrow the predicted loss whose budgets really lose `target`, from all that was tried so far."""
        trials = self.trials
        for _ in range(STEPS):
            low = max((p for p, loss in trials.items() if loss <= target), default=0.0)
            high = min((p for p, loss in trials.items() if loss > target and p > low), default=math.inf)
            if trials.get(low, 0.0) >= 0.98 * target:
                return
            predicted = math.sqrt(low * high) if low and high < math.inf else high / 3 if not low else 3 * low
            predicted = target if math.isinf(predicted) else predicted
            trials[predicted] = self._try(level, cheapest(tables, self.layout, predicted), exact)

    def _try(self, level: str, budgets: Budgets, exact: Losses) -> float:
        """Measured rise of the loss, in nats, on the worst of the texts."""
        if budgets not in self.tried:
            self.tried[budgets] = _rise(self.losses(LevelPlan(budgets), self.fit), exact)
        loss = self.tried[budgets]
        self.report(f"{level}: {record_bytes(budgets, self.layout):,} record bytes, {math.expm1(loss):+.2%}")
        return loss

    def _thresholds(self) -> tuple:
        """FloE's rule at the record bytes of `balanced`: per expert the |u| that keeps the same share everywhere."""
        far = self.runtime.far
        wanted = record_bytes(self.plans["balanced"].budgets, self.layout) / self.layout.record
        share = min(1.0, wanted / (far.layers * self.runtime.top_k * far.neurons))
        gathered: dict[tuple[int, int], list[Tensor]] = {}

        def see(seen: Seen) -> None:
            for e in seen.ids.unique().tolist():
                gathered.setdefault((seen.layer, e), []).append(seen.up[seen.ids == e].flatten().half())
        with self._simulating(None, see):
            for documents in self.fit:
                for ids in _some(documents, 2 * TABLE_TOKENS):
                    self.model(ids)
        return tuple(self._layer_thresholds(gathered, layer, share) for layer in range(far.layers))

    def _layer_thresholds(self, gathered: dict, layer: int, share: float) -> tuple[float, ...]:
        found = {e: _quantile(torch.cat(gathered[layer, e]).float(), 1 - share)
                 for e in range(self.runtime.far.experts) if (layer, e) in gathered}
        usual = sum(found.values()) / max(1, len(found))
        return tuple(found.get(e, usual) for e in range(self.runtime.far.experts))

    # --- what is stored -----------------------------------------------------------------------------------------
    def _measured(self) -> dict:
        """Perplexity and KL of every level on the text that was held back, with its budgets."""
        plans = {"exact": None, **self.plans}
        sums = {level: _Sums() for level in plans}
        self.report("measuring every level on text it was not fitted on")
        for batch in (ids for documents in self.held for ids in documents):
            reference = self._reference(batch)
            for level, plan in plans.items():
                with self._simulating(plan):
                    sums[level].add(_log_probabilities(self.model, batch), reference, batch)
        return {level: sums[level].figures() | self._described(plan) for level, plan in plans.items()}

    def _described(self, plan: LevelPlan | None) -> dict:
        if plan is None:
            return {}
        if plan.thresholds:
            return {"thresholds": [[round(t, 6) for t in row] for row in plan.thresholds]}
        return {"budgets": plan.budgets, "record_bytes_per_token": record_bytes(plan.budgets, self.layout)}

    def _reference(self, batch: Tensor) -> Tensor:
        if self.reference is not None:
            return _log_probabilities(self.reference, batch)
        with self._simulating(None):
            return _log_probabilities(self.model, batch)

    def _traces(self) -> tuple[dict[str, Trace], dict[str, Tensor]]:
        far = self.runtime.far
        traces = {"blob": Trace(far.experts), "sketch": Trace(far.experts)}
        usage = {"experts": torch.zeros(far.layers, far.experts, dtype=torch.int32),
                 "neurons": torch.zeros(far.layers, far.experts * far.neurons, dtype=torch.int32)}
        for level, plan in self.plans.items():
            self.report(f"{level}: trace")
            traces[f"record:{level}"] = trace = Trace(far.experts * far.neurons)
            counted = level == "balanced"
            self._run_trace(plan, lambda seen, t=trace, c=counted: self._follow(seen, t, traces, usage, c))
        usage["neurons"] = usage["neurons"].view(far.layers, far.experts, far.neurons)
        return traces, usage

    def _run_trace(self, plan: LevelPlan, see: Callable[[Seen], None]) -> None:
        with self._simulating(plan, see):
            for documents in self.held:
                for ids in _some(documents, TRACE_TOKENS // len(self.held)):
                    self.model(ids)

    def _follow(self, seen: Seen, trace: Trace, traces: dict, usage: dict, counted: bool) -> None:
        """Every token's picks, one after the other, into the traces; usage is counted at one level only."""
        neurons, layout = self.runtime.far.neurons, self.layout
        for t in range(len(seen.ids)):
            chosen = (seen.fidelity[t] >= 0).nonzero()[:, 0]
            items = seen.ids[t][chosen // neurons] * neurons + chosen % neurons
            need = torch.where(seen.fidelity[t][chosen] == DOWN_ONLY, layout.prefix, layout.record)
            trace.add(seen.layer, items, need)
            if counted:
                usage["neurons"][seen.layer].index_add_(0, items, torch.ones_like(items, dtype=torch.int32))
                usage["experts"][seen.layer][seen.ids[t]] += 1
                for kind in ("blob", "sketch"):
                    traces[kind].add(seen.layer, seen.ids[t], torch.ones_like(seen.ids[t]))


class _Errors:
    """Squared output errors of every layer, for every pair of the grid: see engine/budgets.py."""

    def __init__(self, runtime: Runtime) -> None:
        self.edges = edges(runtime.top_k * runtime.far.neurons)
        self.dropped = torch.zeros(runtime.far.layers, len(self.edges), dtype=torch.float64)
        self.coarse = torch.zeros(runtime.far.layers, len(self.edges), len(self.edges), dtype=torch.float64)
        self.tokens = [0] * runtime.far.layers

    def see(self, seen: Seen) -> None:
        """What each band of ranks adds to the output, and what is missed of it when it is coarse; then every pair."""
        dropped, coarse = self._bands(seen)                                  # [S-1, T, H]
        lost = _before(dropped.flip(0)).flip(0)                              # [S, T, H]: bands from j on are dropped
        missed = _before(coarse)                                             # bands before j are coarse
        self.dropped[seen.layer] += lost.square().sum((1, 2)).double().cpu()
        for i in range(len(self.edges)):
            error = (missed[i:] - missed[i]).square().sum((1, 2))
            self.coarse[seen.layer, i, i:] += error.double().cpu()
        self.tokens[seen.layer] += len(seen.ids)

    def _bands(self, seen: Seen) -> tuple[Tensor, Tensor]:
        rank = seen.scores.argsort(dim=1, descending=True).argsort(dim=1)
        inner = torch.tensor(self.edges[1:-1], device=rank.device)
        band = torch.bucketize(rank, inner, right=True).view(seen.refined.shape)
        whole = seen.refined * seen.weights[..., None]
        missed = whole - seen.coarse * seen.weights[..., None]
        hidden = next(iter(seen.downs.values())).shape[1]
        out = torch.zeros(2, len(self.edges) - 1, len(seen.ids), hidden, device=rank.device)
        for e, down in seen.downs.items():
            token, place = (seen.ids == e).nonzero(as_tuple=True)
            for j in range(len(self.edges) - 1):
                there = band[token, place] == j
                out[0, j].index_add_(0, token, (whole[token, place] * there) @ down)
                out[1, j].index_add_(0, token, (missed[token, place] * there) @ down)
        return out[0], out[1]

    def tables(self) -> list[LayerTable]:
        return [LayerTable(tuple(self.edges), dropped / max(1, n), coarse / max(1, n))
                for dropped, coarse, n in zip(self.dropped, self.coarse, self.tokens, strict=True)]


def _before(bands: Tensor) -> Tensor:
    """[S-1, ...] -> [S, ...]: sum of the bands before each edge."""
    return torch.cat((torch.zeros_like(bands[:1]), bands.cumsum(0)))


class _Sums:
    """Loss and KL(reference || level), summed over batches of log-probabilities [B, R-1, V]."""

    def __init__(self) -> None:
        self.nll, self.kl, self.tokens = 0.0, 0.0, 0

    def add(self, found: Tensor, reference: Tensor, batch: Tensor) -> None:
        self.nll += float(F.nll_loss(found.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
        self.kl += float((reference.exp() * (reference - found)).sum())
        self.tokens += batch[:, 1:].numel()

    def figures(self) -> dict:
        return {"perplexity": math.exp(self.nll / self.tokens), "kl": self.kl / self.tokens}


def _log_probabilities(model, batch: Tensor) -> Tensor:
    return model(batch).logits[:, :-1].float().log_softmax(-1)


def _mean_loss(model, documents: Documents) -> float:
    """Nats per predicted token."""
    total = sum(float(F.nll_loss(_log_probabilities(model, ids)[0], ids[0, 1:], reduction="sum")) for ids in documents)
    return total / sum(ids.shape[1] - 1 for ids in documents)


def _some(documents: Documents, n_tokens: int) -> Documents:
    """The first documents with at most n_tokens together, but one at least."""
    ends = torch.tensor([ids.shape[1] for ids in documents]).cumsum(0)
    return documents[:max(1, int((ends <= n_tokens).sum()))]


def _rise(losses: Losses, exact: Losses) -> float:
    """The worst rise of the loss over the texts."""
    return max(a - b for a, b in zip(losses, exact, strict=True))


def _quantile(values: Tensor, share: float) -> float:
    return float(values.kthvalue(min(len(values), max(1, round(share * len(values))))).values)


def calibrate(folder: Path, texts: Sequence[Path], n_tokens: int, reference_folder: Path | None = None,
              device: str | None = None, report: Report = print) -> dict:
    """Calibrate a compressed folder and store the result in its floe.json; returns it.

    UserError: not a compressed folder, text too short or unreadable. The old calibration stays until the end.
    """
    manifest = Manifest.load(folder)
    loaded = load(folder, Options(level="exact", device=device, predict=False))
    reference = None if reference_folder is None else load(reference_folder, Options(level="full", device=device)).model
    documents = [documents_of(path, loaded.tokenizer, n_tokens // len(texts)) for path in texts]
    found, usage = Calibration(loaded, documents, reference, report).run()
    found |= {"texts": [path.name for path in texts],
              "reference": "exact" if reference_folder is None else reference_folder.name}
    _store(folder, manifest, found, usage)
    return found


def _store(folder: Path, manifest: Manifest, found: dict, usage: dict[str, Tensor]) -> None:
    with SafetensorsWriter(folder / USAGE, len(usage)) as writer:
        for name, counts in usage.items():
            writer.add(name, counts)
    entries: list[FileEntry] = [e for e in manifest.files if e.path != USAGE] + [file_entry(folder / USAGE)]
    Manifest(**{**manifest.__dict__, "files": tuple(entries), "calibration": found}).save(folder)
