"""Generate the reference pages of the docs site from the code, so that they cannot go stale."""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rluf.config.cli import flatten_settings, format_yaml_value  # noqa: E402
from rluf.config.load import iter_setting_fields, load_settings  # noqa: E402
from rluf.config.objectives import BUILTIN_OBJECTIVES  # noqa: E402
from rluf.config.renamed import REPLACED_SETTINGS, describe_old_keys  # noqa: E402
from rluf.tracking import metric_registry  # noqa: E402
from rluf.tracking.gauges import parse_metric_key  # noqa: E402

REFERENCE_PAGES = ("reference/settings.md", "reference/metrics.md", "reference/python.md")
RESULTS_PAGE = "results.md"
PACKAGE_TITLES = {
    "rluf.config": "Settings", "rluf.prepare": "Feedback logs", "rluf.reward": "Reward models",
    "rluf.objectives": "Objectives and judges", "rluf.algorithms": "Algorithms",
    "rluf.backends": "vLLM, DeepSpeed and weight transfer", "rluf.train": "Training run",
    "rluf.checkpoint": "Checkpoints", "rluf.evaluate": "Evaluation", "rluf.sweep": "Sweeps",
    "rluf.simulate": "Simulated users", "rluf.serve": "Serving", "rluf.tracking": "Tracking",
    "rluf.report": "Reports", "rluf.models": "Models", "rluf.utils": "Utilities",
    "actors": "Ray actors", "cluster": "Resource plan and placement",
}  # fmt: skip


class Shapes(griffe.Extension):
    """Escape shapes such as points [N][objectives] in docstrings, which Markdown would read as links."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put a backslash between adjacent brackets."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Remove entries from the navigation whose pages this checkout does not have."""
    entries = [_existing_entry(entry) for entry in config.nav or []]
    config.nav = [entry for entry in entries if entry is not None]
    return config


def _existing_entry(entry: Any) -> Any:
    """The navigation entry without missing pages; None when the page itself is missing."""
    if isinstance(entry, str):
        return entry if entry in (*REFERENCE_PAGES, RESULTS_PAGE) or (ROOT / "docs" / entry).is_file() else None
    ((title, content),) = entry.items()
    if isinstance(content, str):
        return entry if _existing_entry(content) else None
    return {title: [child for child in map(_existing_entry, content) if child is not None]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = dict(zip(REFERENCE_PAGES, (settings_page(), metrics_page(), python_page()), strict=True))
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    pages[RESULTS_PAGE] = results.replace("](../docs/", "](")
    for name, folder in iter_packages():
        pages[f"reference/python/{name}.md"] = package_page(name, folder)
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: Any) -> str:
    """Point links that leave the docs folder to the generated results page, or drop them where they lead to code."""
    path_to_root = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+benchmarks/RESULTS\.md", f"]({path_to_root}{RESULTS_PAGE}", markdown)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:rluf|actors|cluster)/([^)]+)\)", r"\1 (`\2`)", markdown)


def settings_page() -> str:
    """Table of all settings: name, type, default, meaning."""
    defaults = flatten_settings(load_settings(None))
    placeholder = "<name>"  # any other objective
    lines = [
        "# Settings", "",
        "All settings, generated from the code. Change one in a YAML file or with `key=value` on the command line;",
        "`--dry-run` prints the values a command would use and the source of each.",
    ]  # fmt: skip
    section = None
    for key, info in iter_setting_fields([placeholder]):
        key_section = key.rpartition(".")[0] or "The run"
        if key_section != section:
            section = key_section
            lines += ["", f"## {html.escape(section)}", ""]
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
        meaning = html.escape(" ".join((info.description or "").split()), quote=False).replace("|", "&#124;")
        default = defaults.get(key) or format_yaml_value(info.get_default(call_default_factory=True))
        lines.append(f"| `{key}` | `{_type_name(info.annotation)}` | `{default}` | {meaning} |")
    lines += [
        "", "## Renamed and removed settings", "",
        "An old key is refused, and the message says what replaces it. This table is the same one.", "",
        "| old key | now |", "|---|---|",
        *(f"| {old_key} | {html.escape(text, quote=False)} |" for old_key, text in list_replaced_settings()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def list_replaced_settings() -> Iterator[tuple[str, str]]:
    """Each old key with what replaces it today; <name> stands for any objective."""
    for old_key in REPLACED_SETTINGS:
        key = old_key.replace("*", "<name>")
        yield f"`{key}`", describe_old_keys(_nest(key.split(".")))[key]


def _nest(words: list[str]) -> Any:
    return {words[0]: _nest(words[1:])} if words else None


def _type_name(annotation: Any) -> str:
    is_plain_class = isinstance(annotation, type) and not hasattr(annotation, "__args__")
    text = annotation.__name__ if is_plain_class else str(annotation)
    return text.replace("typing.", "").replace(", ...]", "]").replace("tuple[", "list[").replace(" | ", " or ")


def metrics_page() -> str:
    """Table of all metrics of a step: key, names in W&B and Prometheus, meaning, axis, summary."""
    axes = "; ".join(f"`{axis}`, {title}" for axis, title in metric_registry.AXIS_TITLES.items())
    lines = [
        "# Metrics", "",
        "Each training step writes these metrics to `metrics.jsonl`, and the report plots them. W&B logs them under",
        "the second name over the given axis and stores the last, minimum, maximum or mean value in the run's summary.",
        "Ray's Prometheus endpoint exposes them under the third name. Further metrics of an algorithm appear under",
        "`other/` in W&B.", "", f"Axes: {axes}.",
    ]  # fmt: skip
    for group, title in metric_registry.GROUP_TITLES.items():
        lines += ["", f"## {title}", "", "| key | W&B | Prometheus | meaning | axis | summary |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for spec in metric_registry.list_metric_specs(BUILTIN_OBJECTIVES):
            if spec.group == group:
                gauge, labels = parse_metric_key(spec.key, BUILTIN_OBJECTIVES)
                label_text = "".join(f"{{{key}={value}}}" for key, value in labels.items())
                names = f"`{spec.key}` | `{spec.wandb_name}` | `ray_rluf_{gauge}{label_text}`"
                lines.append(f"| {names} | {spec.title}: {spec.description} | {spec.axis} | {spec.summary_statistic} |")
    return "\n".join(lines) + "\n"


def iter_packages() -> Iterator[tuple[str, Path]]:
    """The packages of this checkout that get a reference page, with their folders."""
    for name in PACKAGE_TITLES:
        folder = ROOT / name.replace(".", "/")
        if folder.is_dir():
            yield name, folder


def python_page() -> str:
    """Index of the package pages."""
    links = [f"- [`{name}`](python/{name}.md): {PACKAGE_TITLES[name]}" for name, _ in iter_packages()]
    return (
        "# Python\n\nGenerated from the docstrings. Names that do not appear here are private.\n\n"
        + "\n".join(links)
        + "\n"
    )


def package_page(name: str, folder: Path) -> str:
    """Reference page of a package: its modules with their public members."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
        if path.name != "__main__.py"
    )
    blocks = [f"::: {module}" for module in modules]
    return f"# {PACKAGE_TITLES[name]}\n\n" + "\n\n".join(blocks) + "\n"
