"""The systems whose ideas the policies are: what each paper claims, and which measurement stands beside it."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class System:
    """rows: names of rows of the tables whose figures are repeated beside the claim; note: where there are none."""

    name: str
    source: str
    claim: str
    rows: tuple[str, ...] = ()
    note: str = ""


SYSTEMS = (
    System("FloE", "arXiv 2505.05950", "the next experts guessed from this layer's input by two trained layers",
           ("predict=learned",)),
    System("Fate", "arXiv 2502.12224", "97 % prefetch accuracy with the next layer's gate; others measured 79-89 %",
           ("predict=next:1",)),
    System("AdapMoE", "arXiv 2408.10284", "25 % fewer experts without loss; slots divided by dynamic programming",
           ("predict=none,evict=divided", "route=drop:0.2", "route=drop:0.3")),
    System("HOBBIT", "arXiv 2411.01433", "4.7-8.7 % less miss penalty than LRU by a weighted score; within 1 % at "
           "lower precision on a miss", ("predict=none,evict=hobbit", "route=skip:0.5", "fidelity=score:0.6:0.9")),
    System("DAOP", "arXiv 2501.10375", "up to 8.2 times by guessed experts on the processor",
           ("predict=next:1", "predict=none,free=layer,admit=third,miss=place"),
           "between memory and the file's map; its stale inputs are not computed with"),
    System("FineMoE", "arXiv 2502.05370", "39 % more hits by the nearest expert maps, eviction by 1/(p f)",
           ("predict=maps", "predict=maps,evict=finemoe")),
    System("SiDA-MoE", "arXiv 2310.18859", "90-99 % hash hits (top 3) from token embeddings alone, as an encoder",
           ("predict=sequence",)),
    System("ExpertFlow", "arXiv 2410.17954", "over 95 % in domain by a small transformer", ("predict=sequence",),
           "the same place in the engine; its own transformer is not built"),
    System("eMoE", "arXiv 2503.06823", "2-20 % of accuracy for 20-80 % less memory with resident experts only",
           ("predict=profile", "route=near-only")),
    System("Cache-Conditional Experts", "arXiv 2412.00099", "half the misses for 0.1-3 % of perplexity",
           ("route=near:0.05:1", "route=near:0.1:1", "route=near:0.2:1")),
    System("D2MoE", "arXiv 2504.15299", "33-53 % less memory by bits chosen for each token", ("fidelity=bits:2.4",),
           "by the router's weight; its trained bit router is not built"),
    System("Admission on the third use", "published engine notes", "the same hits at 5-8 times fewer uploads",
           ("predict=none,free=layer", "predict=none,free=layer,admit=third,miss=place")),
    System("APTMoE", "SC 2024", "a split of work between processor and card",
           note="`miss=beside`, by measured rates: see *Held by tests*; what it gains waits for a card"),
    System("SEER-MoE", "arXiv 2404.05089", "25 % of experts pruned by counts",
           ("popularity (pinned)", "mask by hard", "mask by soft"), "without its second stage, which trains"),
    System("Task-specific expert pruning", "arXiv 2206.00277", "99 % of the benefit with one expert left",
           ("mask by reap",), "the experts that matter for one kind of text; its training is not done"),
    System("EEP", "arXiv 2407.00945", "half the experts by evolutionary search", ("search by reap",)),
    System("MEO", "arXiv 2310.09832", "experts merged into one", ("merge by reap",)),
    System("ResMoE", "arXiv 2503.06881", "a common expert and small residuals", ("fidelity=base",),
           "the common expert alone; no residuals are stored"),
    System("ScMoE", "arXiv 2404.05019", "routing known a block early", note="a trained architecture, LongCat-Flash, "
           "which runs: see *Held by tests*; this model is none, and no speed of one was measured"),
    System("MoLE", "arXiv 2503.15798", "experts as tables", note="a trained architecture, which runs: see *Held by "
           "tests*; this model is none, and no speed of one was measured"),
)
