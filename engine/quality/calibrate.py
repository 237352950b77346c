"""Finds what each level may leave out of a compressed model, and stores it in the folder.

Runs the compressed model over text: one pass collects, per layer, the output error of every budget on a grid; one
pass per layer measures how much that error changes the answers; then budgets of equal marginal loss per byte are tried,
each time measuring the whole model (engine/quality/loss_probe.py), until the promise is just kept on every text given.
A third of the text is held back for the figures that are stored and shown. Nothing else of the folder changes, and the
manifest is replaced atomically.
"""
from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch

from engine.core import PROMISES, Options, UserError
from engine.experts.layer import LevelPlan
from engine.files.compressed import SafetensorsWriter
from engine.files.manifest import MADE_OF, FileEntry, Manifest, file_entry
from engine.model.load import Loaded, load
from engine.paths import CALIBRATION_LOG
from engine.quality.budgets import Budgets, LayerTable, OutputErrors, cheapest, record_bytes
from engine.quality.loss_probe import Documents, LossProbe, MeasurementLog, Sums, check_vocabulary, log_probabilities
from engine.quality.sparse_forward import DecodedExperts, LayerTrace, Simulation
from engine.quality.texts import LONGEST, read_tokens
from engine.quality.traces import Trace, miss_curve
from kernels.select import DOWN_ONLY

Tensor = torch.Tensor
Report = Callable[[str], None]
Check = Callable[[int, int, int], None]
PROBE = 0.1          # share of a layer's neurons kept when its sensitivity is measured
TABLE_TOKENS = 1024  # tokens of each text behind the tables of errors
STEPS = 8            # trials to meet a promise
TRACE_TOKENS = 640
USAGE = "usage.safetensors"


def documents_of(path: Path, tokenizer, n_tokens: int) -> Documents:
    """The first documents of a text. UserError when there are too few to hold some back."""
    pieces = [ids for ids in read_tokens(path, tokenizer, n_tokens, LONGEST) if len(ids) > 1]
    if len(pieces) < 3:
        raise UserError(f"{path} has only {len(pieces)} documents; calibration needs at least 3, better hundreds.")
    return [torch.tensor([ids]) for ids in pieces]


class Calibration:
    """The steps, in order, over one open model. texts: the documents of every text; log, skipped: see LossProbe; check:
    see DecodedExperts."""

    def __init__(self, loaded: Loaded, texts: Sequence[Documents], reference=None, report: Report = print,
                 log: MeasurementLog | None = None, skipped: Callable[[int], None] = lambda n_tokens: None,
                 check: Callable[[], None] = lambda: None) -> None:
        self._log, self._skipped = log, skipped
        self.model, self.runtime, self.reference, self.report = loaded.model, loaded.runtime, reference, report
        self.layout = self.runtime.far.layout
        self.fit = [documents[:-(len(documents) // 3)] for documents in texts]
        self.held = [documents[-(len(documents) // 3):] for documents in texts]
        self.plans: dict[str, LevelPlan] = {}
        self.tried: dict[Budgets, float] = {}  # -> the loss that the tables predict
        self.decoded = DecodedExperts(self.runtime, check)

    @property
    def most_tokens(self) -> int:
        """The most that the model reads in `run`: a search may end before its last trial."""
        fit, held = _n_tokens(self.fit), _n_tokens(self.held)
        tables = sum(_n_tokens([_some(text, n) for text in self.fit]) for n in (TABLE_TOKENS, 2 * TABLE_TOKENS))
        traces = _n_tokens([_some(text, TRACE_TOKENS // len(self.held)) for text in self.held])
        return (fit * (2 + self.runtime.far.layers + STEPS * len(PROMISES)) + tables + held * (3 + len(PROMISES))
                + traces * (1 + len(PROMISES)))

    @torch.inference_mode()
    def run(self) -> tuple[dict, dict[str, Tensor]]:
        """-> the manifest's "calibration", and the usage counts."""
        self.report("Measuring level exact, with which the others are compared")
        self.probe = LossProbe(self.model, self._simulating, self.fit, self._log, self._skipped)
        tables = self._tables()
        loosest_first = sorted(PROMISES, key=PROMISES.get, reverse=True)  # what loses most tells the ratio most surely
        found = {level: LevelPlan(self._budgets(level, PROMISES[level], tables)) for level in loosest_first}
        self.plans = {level: found[level] for level in PROMISES}
        self.plans["floe"] = LevelPlan(thresholds=self._thresholds())
        levels = self._measured()
        traces, usage = self._traces()
        self.report("Working out how much has to be fetched")
        stored = {"levels": levels, "miss_curves": {name: miss_curve(trace) for name, trace in traces.items()},
                  "tokens": sum(ids.numel() for documents in self.fit for ids in documents)}
        return stored, usage

    def _simulating(self, plan: LevelPlan | None, observe: Callable[[LayerTrace], None] | None = None,
                    ) -> AbstractContextManager:
        return self.runtime.hooked(Simulation(self.decoded, plan, observe))

    def _watch(self, plan: LevelPlan | None, see: Callable[[LayerTrace], None], texts: Sequence[Documents],
               n_tokens: int) -> None:
        """Run the first documents of every text under a plan, at most n_tokens of each, for `see` to look on."""
        with self._simulating(plan, see):
            for documents in texts:
                for ids in _some(documents, n_tokens):
                    self.model(ids)

    # --- budgets ------------------------------------------------------------------------------------------------
    def _tables(self) -> list[LayerTable]:
        self.report("Measuring layer sensitivity")
        errors = OutputErrors(self.runtime)
        self._watch(None, errors.see, self.fit, TABLE_TOKENS)
        bare = errors.tables()
        probes = [self._thin(layer, bare) for layer in range(len(bare))]
        ratio = _mean(self.probe.ratios(probes))
        tables = [replace(table, loss_per_dropped=self._sensitivity(layer, table, probes[layer], ratio))
                  for layer, table in enumerate(bare)]
        coarse = self._coarse_ratio(tables)
        return [replace(t, loss_per_coarse=t.loss_per_dropped * coarse) for t in tables]

    def _thin(self, layer: int, tables: list[LayerTable]) -> LevelPlan:
        """A plan of one layer with a part of its neurons, the others exact."""
        everything, kept = tables[layer].edges[-1], tables[layer].nearest(PROBE)
        return LevelPlan(tuple((kept if i == layer else everything, 0) for i in range(len(tables))))

    def _sensitivity(self, layer: int, table: LayerTable, probe: LevelPlan, ratio: float) -> float:
        """Loss per unit of dropped error of one layer, mean of the texts.

        Half of it from the layer's own loss, which is noisy, half from its divergence, which is not a loss.
        """
        rises, kept = self.probe.measure(probe), table.nearest(PROBE)
        own, usual = _mean(rise.loss for rise in rises), ratio * _mean(rise.divergence for rise in rises)
        self.report(f"Measuring layer sensitivity, layer {layer}: {own:+.4f} nats, {usual:+.4f} by divergence, "
                    f"with {kept} of {table.edges[-1]} neurons")
        return max((own + usual) / 2, 1e-6) / max(table.loss(kept, 0), 1e-30)

    def _coarse_ratio(self, tables: list[LayerTable]) -> float:
        """Loss per coarse error over loss per dropped error: everything kept in all layers, a part of it coarse.

        Of the loss alone: coarse neurons miss at random, and the same divergence costs less then.
        """
        pairs = tuple((t.nearest(PROBE), t.edges[-1] - t.nearest(PROBE)) for t in tables)
        coarse = max(1e-6, _mean(rise.loss for rise in self.probe.measure(LevelPlan(pairs))))
        weighted = sum(t.loss_per_dropped * float(t.coarse[t.edges.index(r), -1])
                       for t, (r, _) in zip(tables, pairs, strict=True))
        ratio = coarse / max(weighted, 1e-30)
        self.report(f"Measuring coarse neurons: {coarse:+.4f} nats, "
                    f"{ratio:.2f} of the loss of dropped ones at equal error")
        return ratio

    def _budgets(self, level: str, promise: float, tables: list[LayerTable]) -> Budgets:
        """The cheapest budgets tried, for any level, that keep the promise on the worst of the texts."""
        target = math.log1p(promise)
        self._search(level, tables, target)
        everything = tuple((table.edges[-1], 0) for table in tables)
        good = [budgets for budgets in self.tried if self._worst(budgets) <= target]
        best = min(good, key=lambda budgets: record_bytes(budgets, self.layout), default=everything)
        kept = sum(map(sum, best)) / sum(table.edges[-1] for table in tables)
        self.report(f"Trying level {level}: {kept:.0%} of the neurons, "
                    f"{record_bytes(best, self.layout):,} record bytes a token")
        return best

    def _worst(self, budgets: Budgets) -> float:
        return self.probe.worst(LevelPlan(budgets), [LevelPlan(tried) for tried in self.tried])

    def _search(self, level: str, tables: list[LayerTable], target: float) -> None:
        """Narrow the predicted loss whose budgets really lose `target`, from all that was tried so far."""
        for _ in range(STEPS):
            losses = {predicted: self._worst(budgets) for budgets, predicted in self.tried.items()}
            low = max((p for p, loss in losses.items() if loss <= target), default=0.0)
            high = min((p for p, loss in losses.items() if loss > target and p > low), default=math.inf)
            if losses.get(low, 0.0) >= 0.98 * target:
                return
            predicted = math.sqrt(low * high) if low and high < math.inf else high / 3 if not low else 3 * low
            predicted = target if math.isinf(predicted) else predicted
            budgets = cheapest(tables, self.layout, predicted)
            if budgets in self.tried:  # the grid has nothing between
                return
            self.tried[budgets] = predicted
            self.report(f"Trying level {level}: {record_bytes(budgets, self.layout):,} record bytes, "
                        f"{math.expm1(self._worst(budgets)):+.2%}")

    def _thresholds(self) -> tuple:
        """FloE's rule at the record bytes of `balanced`: per expert the |u| that keeps the same share everywhere."""
        far = self.runtime.far
        wanted = record_bytes(self.plans["balanced"].budgets, self.layout) / self.layout.record
        share = min(1.0, wanted / (far.layers * self.runtime.top_k * far.neurons))
        gathered: dict[tuple[int, int], list[Tensor]] = {}

        def see(seen: LayerTrace) -> None:
            for e in seen.ids.unique().tolist():
                gathered.setdefault((seen.layer, e), []).append(seen.up[seen.ids == e].flatten().half())
        self._watch(None, see, self.fit, 2 * TABLE_TOKENS)
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
        sums = {level: Sums() for level in plans}
        self.report("Measuring every level on text it was not fitted on")
        for batch in (ids for documents in self.held for ids in documents):
            reference = self._reference(batch)
            for level, plan in plans.items():
                with self._simulating(plan):
                    sums[level].add(log_probabilities(self.model, batch), reference, batch[0, 1:])
        return {level: sums[level].figures() | self._described(plan) for level, plan in plans.items()}

    def _described(self, plan: LevelPlan | None) -> dict:
        if plan is None:
            return {}
        if plan.thresholds:
            return {"thresholds": [[round(t, 6) for t in row] for row in plan.thresholds]}
        return {"budgets": plan.budgets, "record_bytes_per_token": record_bytes(plan.budgets, self.layout)}

    def _reference(self, batch: Tensor) -> Tensor:
        if self.reference is not None:
            return log_probabilities(self.reference, batch)
        with self._simulating(None):
            return log_probabilities(self.model, batch)

    def _traces(self) -> tuple[dict[str, Trace], dict[str, Tensor]]:
        far = self.runtime.far
        traces = {"blob": Trace(far.experts), "sketch": Trace(far.experts)}
        usage = {"experts": torch.zeros(far.layers, far.experts, dtype=torch.int32),
                 "neurons": torch.zeros(far.layers, far.experts * far.neurons, dtype=torch.int32)}
        for level, plan in self.plans.items():
            self.report(f"Following level {level} through a text")
            traces[f"record:{level}"] = trace = Trace(far.experts * far.neurons)
            counted = level == "balanced"
            self._watch(plan, lambda seen, t=trace, c=counted: self._follow(seen, t, traces, usage, c), self.held,
                        TRACE_TOKENS // len(self.held))
        usage["neurons"] = usage["neurons"].view(far.layers, far.experts, far.neurons)
        return traces, usage

    def _follow(self, seen: LayerTrace, trace: Trace, traces: dict, usage: dict, counted: bool) -> None:
        """Every token's picks, one after the other, into the traces; usage is counted at one level only."""
        neurons, layout = self.runtime.far.neurons, self.layout
        for t in range(len(seen.ids)):
            taken = seen.weights[t] != 0
            chosen = ((seen.fidelity[t] >= 0) & taken.repeat_interleave(neurons)).nonzero()[:, 0]
            items = seen.ids[t][chosen // neurons] * neurons + chosen % neurons
            need = torch.where(seen.fidelity[t][chosen] == DOWN_ONLY, layout.prefix, layout.record)
            trace.add(seen.layer, items, need)
            if counted:
                usage["neurons"][seen.layer].index_add_(0, items, torch.ones_like(items, dtype=torch.int32))
                ids = seen.ids[t][taken]
                usage["experts"][seen.layer][ids] += 1
                for kind in ("blob", "sketch"):
                    traces[kind].add(seen.layer, ids, torch.ones_like(ids))


def _some(documents: Documents, n_tokens: int) -> Documents:
    """The first documents with at most n_tokens together, but one at least."""
    ends = torch.tensor([ids.shape[1] for ids in documents]).cumsum(0)
    return documents[:max(1, int((ends <= n_tokens).sum()))]


def _n_tokens(texts: Sequence[Documents]) -> int:
    return sum(ids.numel() for documents in texts for ids in documents)


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _quantile(values: Tensor, share: float) -> float:
    return float(values.kthvalue(min(len(values), max(1, round(share * len(values))))).values)


def calibrate(folder: Path, texts: Sequence[Path], n_tokens: int, reference_folder: Path | None = None,
              device: str | None = None, report: Report = print,
              check: Check = lambda read, skipped, most: None) -> dict:
    """Calibrate a compressed folder and store the result in its floe.json; returns it.

    check: is called before every document and, within it, before every expert, with the tokens read so far, those that
    an earlier run had measured, and the most that all of it may be; may raise. Stopped or killed, the next call goes on
    with what was measured.
    UserError: not a compressed folder, text too short or unreadable, a reference with another vocabulary. The old
    calibration stays until the end.
    """
    manifest = Manifest.load(folder)
    loaded = load(folder, Options(level="exact", device=device, predict=False))
    reference = None
    if reference_folder is not None:
        reference = load(reference_folder, Options(level="full", device=device)).model
        check_vocabulary(loaded.model, reference)
    documents = [documents_of(path, loaded.tokenizer, n_tokens // len(texts)) for path in texts]
    log, progress = MeasurementLog(folder, _subject(manifest, loaded, documents)), _Progress(check)
    calibration = Calibration(loaded, documents, reference, report, log, progress.skip, progress.look)
    progress.watch(loaded.model, calibration.most_tokens)
    found, usage = calibration.run()
    found |= {"texts": [path.name for path in texts],
              "reference": "exact" if reference_folder is None else reference_folder.name}
    found |= {name: manifest.calibration[name] for name in MADE_OF if name in manifest.calibration}
    _store(folder, manifest, found, usage)
    (folder / CALIBRATION_LOG).unlink(missing_ok=True)
    return found


def _subject(manifest: Manifest, loaded: Loaded, texts: Sequence[Documents]) -> str:
    """A hash of what measurements hold for: these files, these tokens, this kind of device."""
    files = [(entry.path, entry.sha256) for entry in manifest.files if entry.path != USAGE]
    tokens = [[ids.tolist() for ids in documents] for documents in texts]
    return hashlib.sha256(repr((files, tokens, loaded.model.device.type)).encode()).hexdigest()


class _Progress:
    """Tells `check` how many tokens have been read."""

    def __init__(self, check: Check) -> None:
        self._check, self._read, self._skipped, self._most = check, 0, 0, 0

    def look(self) -> None:
        self._check(self._read, self._skipped, self._most)

    def skip(self, n_tokens: int) -> None:
        self._skipped += n_tokens

    def watch(self, model, most: int) -> None:
        def before(module, ids: tuple[Tensor]) -> None:
            self.look()
            self._read += ids[0].numel()
        self._most = most
        model.register_forward_pre_hook(before)


def _store(folder: Path, manifest: Manifest, found: dict, usage: dict[str, Tensor]) -> None:
    entries: list[FileEntry] = [e for e in manifest.files if e.path != USAGE]
    replace(manifest, files=tuple(entries)).save(folder)  # a kill behind this leaves no file of another calibration
    with SafetensorsWriter(folder / USAGE, len(usage)) as writer:
        for name, counts in usage.items():
            writer.add(name, counts)
    replace(manifest, files=(*entries, file_entry(folder / USAGE)), calibration=found).save(folder)
