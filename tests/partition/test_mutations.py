"""The tests would notice: each rule that keeps a partition right is broken here on purpose, and a
test of that hazard fails."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from aotfunc.partition import default_partition, ops, partitions, problem, roles, split
from tests.partition import test_hazards as hazards
from tests.partition import test_lower_peak as lower_peak
from tests.partition import test_numbers as numbers
from tests.partition import test_solve as solving

Broken = list[tuple[Any, str, Any]]
SCHEDULE, SAVING_COST = split.schedule, problem.saving_cost
NO_VERIFIER: Broken = [(partitions, "check", lambda *args, **kwargs: None)]


def in_order_of_the_joint(
    joint: Any, held: list[bool], hosted: set[int]
) -> tuple[list[int], list[int]]:
    early, late = SCHEDULE(joint, held, hosted)
    return sorted(early), sorted(late)


def free_to_save(n: Any, *given: Any) -> float:
    return 0.0 if n.op == "placeholder" else SAVING_COST(n, *given)


def views_as_others(n: Any, *given: Any) -> float:
    return 1.0 if ops.is_view(n) else SAVING_COST(n, *given)


def rule(name: str, broken: Broken, test: Callable, *args: Any) -> Any:
    return pytest.param(broken, test, args, id=name)


cheapest, never = hazards.cheapest, lambda n: False
RULES = [
    rule(
        "a draw runs once; the verifier sees it",
        [(roles, "once", never)],
        *(hazards.test_draws_run_once, "rand_like", cheapest),
    ),
    rule(
        "a draw runs once; the numbers show it",
        [(roles, "once", never), *NO_VERIFIER],
        *(hazards.test_draws_run_once, "rand_like", cheapest),
    ),
    rule(
        "draws that nobody reads stay",
        [(roles, "is_pinned", never)],
        hazards.test_dead_draws_stay_in_order,
    ),
    rule(
        "attention draws only with dropout",
        [(ops, "draws", lambda n: "attention" in str(n.target))],
        *(hazards.test_attention_is_random_only_with_dropout, 0.0, True),
    ),
    rule(
        "a draw of the backward runs once; the verifier sees it",
        [(roles, "once", never)],
        lower_peak.test_what_the_backward_draws_runs_once,
    ),
    rule(
        "a draw of the backward runs once; the numbers show it",
        [(roles, "once", never), *NO_VERIFIER],
        lower_peak.test_what_the_backward_draws_runs_once,
    ),
    rule(
        "an effect runs once",
        [(ops, "has_effect", never)],
        *(hazards.test_marked_callables_run_once, "effect", cheapest),
    ),
    rule(
        "checks that nobody reads stay",
        [(roles, "is_pinned", never)],
        *(hazards.test_checks_without_a_reader_stay, default_partition),
    ),
    rule(
        "an op that is not known runs once",
        [(ops, "vouched", lambda op: True)],
        hazards.test_unknown_ops_run_once,
    ),
    rule(
        "an input that is overwritten is saved as a copy; the verifier sees it",
        [(split.Copy, "keep", lambda self, n: n)],
        *(hazards.test_input_that_is_overwritten_is_saved_as_a_copy, default_partition),
    ),
    rule(
        "an input that is overwritten is saved as a copy; the numbers show it",
        [(split.Copy, "keep", lambda self, n: n), *NO_VERIFIER],
        *(hazards.test_input_that_is_overwritten_is_saved_as_a_copy, default_partition),
    ),
    rule(
        "a joint graph is functional",
        [(roles, "writes", never)],
        hazards.test_mutation_is_refused,
    ),
    rule(
        "the memory is saved, not its views",
        [(problem, "saving_cost", views_as_others), *NO_VERIFIER],
        *(hazards.test_storage_is_saved_not_its_views, default_partition),
    ),
    rule(
        "an input is not saved for its size",
        [(problem, "saving_cost", free_to_save)],
        *(hazards.test_sizes_are_saved_as_numbers, default_partition),
    ),
    rule(
        "the inside of a checkpoint is not saved",
        [(problem, "regions", lambda joint: (set(), set()))],
        *(hazards.test_checkpointed_regions_are_computed_again, default_partition, "region"),
    ),
    rule(
        "values live shortest",
        [(split, "schedule", in_order_of_the_joint)],
        hazards.test_values_live_shortest,
    ),
    rule(
        "what follows a cotangent is late",
        [(roles, "is_tangent", never)],
        *(numbers.test_equal_to_eager, "sine", "fake"),
    ),
    rule(
        "both halves compute what the joint graph does",
        [(sys.modules["aotfunc.partition.verify"], "check_copy", lambda *args: None)],
        solving.test_verify_finds_every_fault,
    ),
]


@pytest.mark.parametrize("broken, test, args", RULES)
def test_breaking_a_rule_fails_a_test(
    broken: Broken, test: Callable, args: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    test(*args)
    for where, name, what in broken:
        monkeypatch.setattr(where, name, what)
    with pytest.raises((Exception, pytest.fail.Exception)):
        test(*args)
