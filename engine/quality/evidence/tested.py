"""What policies are held to without a figure: each claim with the test that holds it."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tested:
    """test: FILE::NAME below tests/."""

    claim: str
    test: str

    @property
    def found(self) -> str:
        return f"`pytest tests/{self.test}`"


IN_ANSWERS, POLICIES = "engine/chat/test_policies_in_answers.py", "engine/policies/test_policies.py"
TABLE = "engine/files/test_lookup_table.py"
SHORTCUT = "engine/model/test_shortcut.py"
REPLAYS, SPECIALISTS = "engine/quality/test_simulate.py", "engine/quality/test_specialists.py"
TESTED = (
    Tested("without loss equals plain forward, for predictors and evictions",
           f"{REPLAYS}::test_a_replay_counts_what_the_engine_counted"),
    Tested("so do the answers of a chat", f"{IN_ANSWERS}::test_lossless_is_the_models_own_answer_before_and_after_"
           "another_choice"),
    Tested("the simulator equals the engine byte for byte", f"{REPLAYS}::test_a_replay_counts_what_the_engine_counted"),
    Tested("margin 0 and neutral thresholds change nothing", f"{REPLAYS}::test_neutral_numbers_change_no_output"),
    Tested("an infinite margin takes nothing far", f"{POLICIES}::test_an_infinite_margin_never_takes_what_is_far"),
    Tested("a layer's own router recalls 100 %", f"{POLICIES}::test_a_layers_own_router_is_always_right"),
    Tested("dynamic programming equals brute force", f"{POLICIES}::test_dynamic_programming_equals_brute_force"),
    Tested("EEP: one-hot rows are masking", f"{SPECIALISTS}::test_one_hot_rows_are_masking"),
    Tested("EEP: the identity is the full model", f"{SPECIALISTS}::test_the_identity_is_the_model_itself"),
    Tested("hard counts sum to tokens x k", f"{SPECIALISTS}::test_what_is_counted_is_what_the_runtime_routes"),
    Tested("a draft changes no answer, and nothing of it stays", f"{IN_ANSWERS}::test_a_draft_brings_near_what_the_"
           "nearest_answers_took_and_changes_no_answer"),
    Tested("*cached only* moves no byte in decode", f"{IN_ANSWERS}::test_cached_only_fetches_nothing_while_it_writes"),
    Tested("a person is answered within a program's answer (a processor)", "engine/chat/test_giving_way.py::"
           "test_a_person_is_answered_within_a_programs_answer"),
    Tested("titles wait behind a person", "app/chat/test_titles.py::test_a_person_who_goes_on_does_not_wait_and_the_"
           "title_comes_later"),
    Tested("who waits for the engine goes by deadline", "app/openai_api/test_parts.py::test_the_nearest_deadline_"
           "comes_next_and_nobody_together"),
    Tested("a job that is expected to take less goes before where nobody is late by it (eMoE)", "app/openai_api/"
           "test_parts.py::test_a_short_job_goes_before_a_long_one_where_nobody_is_late_by_it"),
    Tested("LongCat-Flash: an identity expert moves no byte and adds w x",
           f"{SHORTCUT}::test_a_token_of_identities_alone_moves_no_byte"),
    Tested("LongCat-Flash: joined late as eager, to the bit", f"{SHORTCUT}::test_joined_late_is_eager_bit_for_bit"),
    Tested("LongCat-Flash: its early router recalls 100 %",
           f"{SHORTCUT}::test_all_that_is_needed_was_asked_for_at_the_gate"),
    Tested("MoLE: logits of the training form are those of the tables",
           f"{TABLE}::test_the_training_forms_logits_are_the_tables"),
    Tested("misses of a card computed beside it by the processor, same text (by references, no card yet)",
           "engine/experts/test_beside.py::test_what_is_written_depends_neither_on_the_share_nor_on_what_is_near"),
)
