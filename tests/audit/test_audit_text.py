"""What an audit prints of many findings."""

from __future__ import annotations

from stackgrow.audit.report import MOST_SHOWN, Audit, Finding


def audit_of(**counts: int) -> Audit:
    """With so many findings of each check."""
    audit = Audit("runs/tiny")
    for check, count in counts.items():
        audit.findings += [Finding(check, "a file", f"wrong {i}") for i in range(count)]
    return audit


def test_of_many_findings_the_first_are_shown_and_the_others_counted() -> None:
    lines = audit_of(records=MOST_SHOWN + 3, stages=2).render().splitlines()
    assert sum("  records  a file: " in line for line in lines) == MOST_SHOWN
    assert "  records  and 3 more (--json has all)" in lines
    assert "  stages  a file: wrong 1" in lines


def test_what_follows_from_another_recipe_is_told_once() -> None:
    """An edited recipe.toml is one thing, though every file of the run then contradicts it."""
    audit = audit_of(recipe=2, stages=14, records=1)
    text = audit.render()
    assert "FAILED: 17 findings" in text
    assert text.count("  stages  a file: ") == 1
    assert (
        "  stages  and 13 more, as can follow from what is wrong with the recipe"
        in text
    )
    assert text.count("  recipe  a file: ") == 2
    assert text.count("  records  ") == 1
    assert len(audit.to_dict()["findings"]) == 17
