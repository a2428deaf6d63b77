"""Self-contained HTML pages in one style: the run report, the data card, the signals page and the reward card.

A page is a Jinja template that extends page.html.j2; parts.html.j2 has the macros for tables, plots and badges.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rluf


def render_html_page(
    template_name: str,
    *,
    package: str,
    figures: Mapping[str, Mapping[str, Any]] | None = None,
    has_script: bool = False,
    **context: Any,
) -> str:
    """Render a template of `package` to a page that needs no network and no other file.

    `figures` are Plotly figures by id, with the page's color names (see rluf.report.figures). Only a page with figures
    contains plotly.js (4 to 5 MB); a page without has no scripts
    unless `has_script` allows those of its own template.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

    # The package comes first, so that a page can have its own template next to the code that fills it.
    template_loader = ChoiceLoader([PackageLoader(package, ""), PackageLoader("rluf.report", "")])
    # autoescape, because prompts, responses and user names of the log appear on the pages.
    environment = Environment(loader=template_loader, autoescape=True, undefined=StrictUndefined)
    plotly_js = ""
    if figures:
        from plotly.offline import get_plotlyjs

        plotly_js = get_plotlyjs()
    template = environment.get_template(template_name)
    return template.render(
        **context, figures=figures or {}, has_script=has_script, plotly_js=plotly_js, rluf_version=rluf.__version__
    )
