"""Makes the reference pages of the docs site from the code itself, so that they cannot be stale."""

from __future__ import annotations

import html
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rluf.config.cli import flat  # noqa: E402
from rluf.config.load import fields, load_settings  # noqa: E402
from rluf.tracking import metric_registry as catalogue  # noqa: E402
from rluf.tracking.gauges import place  # noqa: E402

GENERATED = ("reference/settings.md", "reference/metrics.md", "reference/python.md")
PACKAGES = {
    "rluf.config": "Settings", "rluf.prepare": "Feedback logs", "rluf.objectives": "Reward models and judges",
    "rluf.algorithms": "Algorithms", "rluf.backends": "vLLM, DeepSpeed and weight transfer",
    "rluf.evaluate": "Evaluation", "rluf.simulate": "Simulated users", "rluf.serve": "Serving",
    "rluf.tracking": "Seeing a run", "actors": "Ray actors and pumps", "cluster": "Where actors run",
}  # fmt: skip


class Shapes(griffe.Extension):
    """Shapes in docstrings, such as points [N][objectives], are no links of Markdown."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Part the brackets with a backslash."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("][", "]\\[")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out of the navigation what this checkout does not have."""
    config.nav = [kept for entry in config.nav or [] if (kept := _there(entry)) is not None]
    return config


def _there(entry: Any) -> Any:
    if isinstance(entry, str):
        return entry if entry in GENERATED or (ROOT / "docs" / entry).is_file() else None
    ((title, inside),) = entry.items()
    if isinstance(inside, str):
        return entry if _there(inside) else None
    return {title: [kept for one in inside if (kept := _there(one)) is not None]}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code."""
    pages = {GENERATED[0]: settings_page(), GENERATED[1]: metrics_page(), GENERATED[2]: python_page()}
    for name, package in packages():
        pages[f"reference/python/{name}.md"] = package_page(name, package)
    for path, content in pages.items():
        files.append(File.generated(config, path, content=content))
    return files


def settings_page() -> str:
    """Every setting: name, type, default, meaning."""
    defaults = flat(load_settings(None))
    lines = [
        "# Settings", "",
        "Every setting, from the code. A YAML file or `key=value` on the command line changes it; `--dry-run` shows",
        "what a command would run with and where each value comes from.",
    ]  # fmt: skip
    section = None
    for key, info in fields():
        head = key.rpartition(".")[0] or "The run"
        if head != section:
            section = head
            lines += ["", f"## {head}", "", "| setting | type | default | meaning |", "|---|---|---|---|"]
        about = " ".join((info.description or "").split())
        about = html.escape(about, quote=False).replace("|", "&#124;")
        lines.append(f"| `{key}` | `{_type(info.annotation)}` | `{defaults[key]}` | {about} |")
    return "\n".join(lines) + "\n"


def _type(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return text.replace("typing.", "").replace(", ...]", "]").replace("tuple[", "list[").replace(" | ", " or ")


def metrics_page() -> str:
    """Every number of a step: where it stands, what it means, what it is drawn over."""
    lines = [
        "# Metrics", "",
        "What each training step leaves in `metrics.jsonl`, and the report draws. W&B has it under the second name,",
        "over its axis, and keeps the last, least, greatest or mean value as the run's summary. Ray's Prometheus",
        "endpoint has it as the third. What an algorithm adds beside these stands under `other/` in W&B.", "",
        "Axes: " + "; ".join(f"`{axis}`, {about}" for axis, about in catalogue.AXES.items()) + ".",
    ]  # fmt: skip
    for group, about in catalogue.GROUPS.items():
        lines += ["", f"## {about}", "", "| key | W&B | Prometheus | meaning | axis | summary |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for spec in catalogue.catalogue(catalogue.OWN):
            if spec.group == group:
                gauge, labels = place(spec.key, catalogue.OWN)
                label = "".join(f"{{{key}={value}}}" for key, value in labels.items())
                names = f"`{spec.key}` | `{spec.name}` | `ray_rluf_{gauge}{label}`"
                lines.append(f"| {names} | {spec.title}: {spec.about} | {spec.axis} | {spec.keep} |")
    return "\n".join(lines) + "\n"


def packages() -> Iterator[tuple[str, Path]]:
    """The packages of this checkout that have a page."""
    for name in PACKAGES:
        folder = ROOT / name.replace(".", "/")
        if folder.is_dir():
            yield name, folder


def python_page() -> str:
    """The list of packages."""
    links = [f"- [`{name}`](python/{name}.md): {PACKAGES[name]}" for name, _ in packages()]
    return "# Python\n\nFrom the docstrings. What is not named here is not public.\n\n" + "\n".join(links) + "\n"


def package_page(name: str, folder: Path) -> str:
    """All modules of a package, each with its public members."""
    modules = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in folder.rglob("*.py")
    )
    blocks = [f"::: {module}" for module in modules]
    return f"# {PACKAGES[name]}\n\n" + "\n\n".join(blocks) + "\n"
