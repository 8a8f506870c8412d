import pytest

from stackgrow.growth.rules import Alias, Compute, GrowthError, Rule, Rules

SOURCE = {"a": (2, 3), "b": (2,)}
TARGET = {"x": (2, 3), "y": (4,)}
GOOD: dict[str, Rule] = {
    "x": Alias("a"),
    "y": Compute(("b", "b"), lambda p, q: p, "join"),
}


def test_complete_rules_are_accepted() -> None:
    assert Rules(GOOD, SOURCE, TARGET).targets == GOOD
    assert Rules(
        {"x": Alias("a")}, SOURCE, {"x": (2, 3)}, frozenset({"b"})
    ).dropped == {"b"}


@pytest.mark.parametrize(
    ("targets", "dropped", "told"),
    [
        ({"x": Alias("a")}, {"b"}, "no rule makes these target tensors: y"),
        ({**GOOD, "z": Alias("a")}, set(), "the target model has no such tensors: z"),
        (
            {**GOOD, "y": Compute(("b", "c"), max, "max")},
            set(),
            "the source model has no such tensors: c",
        ),
        (GOOD, {"d"}, "the source model has no such tensors: d"),
        (
            {"x": Alias("a"), "y": Compute((), lambda: 0, "new")},
            set(),
            "neither used nor dropped: b",
        ),
        (GOOD, {"b"}, "dropped, yet used: b"),
        (
            {**GOOD, "y": Alias("b")},
            set(),
            r"an Alias keeps the shape; use Compute for: y \(4,\) from b \(2,\)",
        ),
    ],
)
def test_every_key_is_accounted_for(
    targets: dict[str, Rule], dropped: set[str], told: str
) -> None:
    with pytest.raises(GrowthError, match=told):
        Rules(targets, SOURCE, TARGET, frozenset(dropped))


def test_all_problems_are_told_at_once_and_long_lists_are_cut() -> None:
    many = {f"t{i:02}": (1,) for i in range(12)}
    with pytest.raises(
        GrowthError, match=r"t00, .*, t07 and 4 more; .*neither used nor dropped: a, b"
    ):
        Rules({}, SOURCE, many)
