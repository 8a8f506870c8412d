"""A page for people from a template: one file that needs nothing else."""

from __future__ import annotations

from typing import Any


def page(template: str, values: dict[str, Any]) -> str:
    """``template`` of this package, by its path, filled with ``values``; whatever they hold is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("stackgrow", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)
