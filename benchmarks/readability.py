"""Indicators of how readable the source is: shares of multi-word names, comments per 1,000 lines, sizes.

Counts locals, arguments, functions and classes by syntax tree, so that the same call measures any Python project:

    python benchmarks/readability.py                   # rluf, actors, cluster
    python benchmarks/readability.py PATH [PATH ...]   # folders of another checkout
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FUNCTION_LINES, MAX_FILE_LINES = 80, 600
DIRECTIVE = re.compile(r"#\s*(fmt:|type:|noqa|!)")
"""Comments for tools, which say nothing to a reader."""


def has_several_words(name: str) -> bool:
    """Whether a snake_case or CamelCase name has two words or more."""
    return len(re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name.strip("_"))) > 1


def iter_names(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(kind, name) of each function, class, argument and assigned variable; self, cls, _ and dunders are left out."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("__"):
            yield "function", node.name
        elif isinstance(node, ast.ClassDef):
            yield "class", node.name
        elif isinstance(node, ast.arg) and node.arg not in ("self", "cls", "_"):
            yield "argument", node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "_":
            yield "variable", node.id


def count_long_functions(tree: ast.Module) -> int:
    """Functions of more than MAX_FUNCTION_LINES lines."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return sum((node.end_lineno or node.lineno) - node.lineno + 1 > MAX_FUNCTION_LINES for node in functions)


def measure(folders: list[Path]) -> dict[str, float]:
    """The indicators over all Python files of the folders."""
    totals: Counter[str] = Counter()
    for path in sorted(file for folder in folders for file in folder.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
        lines = source.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        totals["files"] += 1
        totals["lines"] += lines
        totals["long_files"] += lines > MAX_FILE_LINES
        totals["long_functions"] += count_long_functions(tree)
        totals["comments"] += sum(t.type == tokenize.COMMENT and not DIRECTIVE.match(t.string) for t in tokens)
        for kind, name in iter_names(tree):
            totals["names"] += 1
            totals[kind] += 1
            totals["multi_word_names"] += has_several_words(name)
            totals[f"multi_word_{kind}"] += has_several_words(name)
    return {
        "files": totals["files"],
        "lines": totals["lines"],
        "multi_word_names": round(totals["multi_word_names"] / totals["names"], 3),
        "multi_word_functions": round(totals["multi_word_function"] / totals["function"], 3),
        "one_word_classes": round(1 - totals["multi_word_class"] / totals["class"], 3),
        "comments_per_1000_lines": round(1000 * totals["comments"] / totals["lines"], 1),
        "functions_over_80_lines": totals["long_functions"],
        "files_over_600_lines": totals["long_files"],
    }


def main() -> None:
    """Print the indicators; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folders", nargs="*", type=Path, default=[ROOT / name for name in ("rluf", "actors", "cluster")]
    )
    indicators = measure(parser.parse_args().folders)
    for name, value in indicators.items():
        sys.stdout.write(f"{name:28s} {value:g}\n")
    sys.stdout.write(json.dumps(indicators) + "\n")


if __name__ == "__main__":
    main()
