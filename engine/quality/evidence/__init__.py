"""The evidence: every policy on one model at three sizes of near memory, what its paper claims, what was measured."""
