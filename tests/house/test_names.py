"""Names say what a value is, and prose uses the terms of the field: words that neither may use."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ("rluf", "actors", "cluster")
CODE = (*LIBRARY, "benchmarks")
MIN_LONG_NAME_SHARE, MIN_LONG_FUNCTION_SHARE, MAX_ONE_WORD_CLASS_SHARE = 0.5, 0.85, 0.1

# Names that do not say what the value is. `scores`, `message`, `rows`, `index` or `checkpoint` do.
VAGUE_NAMES = frozenset({
    "ask", "asked", "drawn", "found", "fresh", "gang", "given", "goods", "half", "held", "kept", "learnt",
    "mine", "one", "opinion", "opinions", "ours", "part", "piece", "pieces", "place",
    "places", "reckoned", "shown", "side", "sides", "talk", "talks", "told", "twin", "twins", "whole",
})  # fmt: skip
# Words that are no term of the field, in prose or as a part of a name.
UNUSUAL_WORDS = frozenset({
    "alike", "amiss", "anew", "foresee", "foresees", "foreseen", "foretell", "foretells", "learnt", "mend",
    "mended", "nobody", "noughts", "reckon", "reckons", "reckoned", "told", "whoever",
})  # fmt: skip
UNUSUAL_PROSE = re.compile(
    rf"\b({'|'.join(sorted(UNUSUAL_WORDS))}|kept|held|beside|shall|goes on|go on|a lone|at hand|drawn)\b", re.IGNORECASE
)
# Uses that are terms: held-out data, a lock or a value that is held, the counts of a data card, Unicode surrogates.
TERMS = re.compile(
    r"held[- ]?out|locks?\b[^.]*\bheld|held at|lone surrogate"
    r"|\bkept\b.*(dropped|quarantined)|(dropped|quarantined).*\bkept\b|\bkept \+",
    re.IGNORECASE,
)
CODE_SPAN = re.compile(r"`[^`]*`")
MESSAGE_CALLS = frozenset({
    "debug", "info", "warning", "error", "critical", "exception",
})  # fmt: skip

# First words of functions: verbs, is/has/should/can for a truth value, as/from/to for a conversion, iter and on.
VERBS = frozenset({
    "accept", "accumulate", "acquire", "add", "adjust", "admit", "advance", "aggregate", "allocate", "analyze",
    "append", "apply", "apportion", "as", "assign", "attribute", "average", "backward", "begin", "bin", "bootstrap",
    "broadcast", "build", "calibrate", "call", "can", "cap", "capture", "chat", "check", "choose", "claim",
    "classify", "clip", "close", "collate", "collect", "combine", "compare", "complete", "compute", "connect",
    "construct", "copy", "correlate", "count", "create", "decide", "decode", "decompress", "delete", "deploy",
    "derive", "describe", "detect", "diff", "disattenuate", "discard", "download", "drain", "drop", "dump", "enable",
    "encode", "end", "ensure", "equalize", "erase", "estimate", "eval", "evaluate", "execute", "exit", "expand",
    "explain", "export", "fetch", "fill", "find", "fingerprint", "finish", "fit", "fits", "flatten", "flush", "fold",
    "format", "forward", "freeze", "from", "fsync", "gather", "generate", "get", "group", "guess", "handle", "has",
    "hash", "ignore", "import", "index", "init", "inspect", "is", "iter", "join", "judge", "label", "launch", "leave",
    "linearize", "link", "list", "load", "lock", "log", "lower", "main", "make", "map", "mark", "mask", "match",
    "measure", "merge", "monitor", "move", "name", "nest", "normalize", "offload", "on", "open", "order", "pack",
    "pad", "pair", "paraphrase", "parse", "pass", "pause",
    "plan", "pool", "post", "predict", "prepare", "print", "probe",
    "protect", "prune", "put", "quarantine", "raise", "rank", "read", "rebatch", "receive", "recommend",
    "reconfigure", "record", "redact", "redirect", "refresh", "refuse", "register", "reject", "relay", "release",
    "reload", "remove", "rename", "render", "repair", "replace", "replay", "report", "require", "requires",
    "rerandomize", "rerank", "rescore", "reset", "resolve", "respond", "restart", "restore",
    "resume", "retry", "roll", "round",
    "run", "sample", "save", "scale", "schedule", "score", "select", "send", "serve", "set", "setup", "shorten",
    "should", "shrink", "shutdown", "simulate", "skip", "sleep", "slice", "sort", "split", "standardize", "start",
    "step", "stop", "store", "stream", "strip", "submit", "subsample", "subtract", "suggest", "sum", "summarize",
    "switch", "sync", "take", "time", "to", "tokenize", "train", "transfer", "translate", "truncate", "try", "unwrap",
    "update", "upload", "validate", "verify", "visit", "wait", "wake", "warn", "watch", "whiten", "with", "wrap",
    "write", "zip",
})  # fmt: skip
MIN_VERB_SHARE = 0.97
"""Share of functions that start with a verb; the others name a figure or a formula."""
VERB_PACKAGES = (
    "actors/", "rluf/algorithms/", "rluf/artifacts.py", "rluf/backends/", "rluf/checkpoint/", "rluf/config/",
    "rluf/evaluate/", "rluf/models/", "rluf/objectives/", "rluf/prepare/", "rluf/report/", "rluf/reward/",
    "rluf/serve/", "rluf/sweep/", "rluf/tracking/", "rluf/train/", "rluf/types.py", "rluf/utils/",
)  # fmt: skip
"""Packages where every function starts with a verb."""
FRAMEWORK_NAMES = frozenset({
    "connection_lost", "connection_made", "data_received", "eof_received", "error", "handleError", "forward", "main",
})  # fmt: skip
"""Methods that a framework calls by name."""
FIELD_NAMES = frozenset({
    "auroc", "average_precision", "binary_entropy", "bradley_terry_loss", "brier_score", "cispo", "codpo", "crpg",
    "crraft", "dr_grpo", "expected_calibration_error", "focal_loss", "gdpo", "grpo", "gspo", "hash64", "hinge_loss",
    "kto", "lite_ppo", "log_loss", "logit", "non_negative_pu_loss", "pairwise_loss", "pearson_correlation", "ppo",
    "dpo", "reinforce", "reinforce_pp", "reinforce_pp_baseline", "rloo", "sigmoid", "weighted_bce_loss",
    "wilson_interval",
})  # fmt: skip
"""Algorithms and formulas that the field knows by this name."""
NOUN_DECORATORS = frozenset({"property", "cached_property", "contextmanager", "asynccontextmanager", "get", "post"})

ParseFolders = Callable[..., tuple[Any, ...]]


def iter_names(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str, str]]:
    """Line, kind and name of every class, function, argument, assigned variable and field."""
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            yield node.lineno, "class", node.name
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, "function", node.name
            arguments = node.args
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                yield argument.lineno, "argument", argument.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, "variable", node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, "attribute", node.attr


def split_words(name: str) -> list[str]:
    """Lower-case words of a snake_case or CamelCase name."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z0-9]*|[a-z0-9]+", name)]


def iter_prose(text: str, nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring (of settings too), comment, log message and error message."""
    for node in nodes:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value
        elif isinstance(node, ast.Call) and _is_message_call(node.func):
            for argument in node.args:
                for part in ast.walk(argument):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield node.lineno, part.value
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def _is_message_call(function: ast.expr) -> bool:
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    return name in MESSAGE_CALLS or name.endswith("Error")


def test_names_say_what_the_value_is(parse_folders: ParseFolders) -> None:
    violations = [
        f"{source.path}:{line} {kind} {name}"
        for source in parse_folders(*CODE)
        for line, kind, name in iter_names(source.nodes)
        if name.strip("_").lower() in VAGUE_NAMES or UNUSUAL_WORDS & set(split_words(name))
    ]
    assert not violations, "\n".join(violations)


def test_prose_uses_the_terms_of_the_field(parse_folders: ParseFolders) -> None:
    violations = [
        f"{source.path}:{line + offset}: {match.group()}"
        for source in parse_folders(*CODE)
        for line, text in iter_prose(source.text, source.nodes)
        for offset, text_line in enumerate(text.splitlines())
        for match in UNUSUAL_PROSE.finditer(TERMS.sub("", text_line))
    ]
    assert not violations, "\n".join(violations)


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "docs"])
def test_documentation_uses_the_terms_of_the_field(name: str) -> None:
    files = [ROOT / name] if name.endswith(".md") else sorted((ROOT / name).rglob("*.md"))
    violations = []
    for file in files:
        if "transcripts" in file.parts:  # recorded output of commands
            continue
        in_code_block = False
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            in_code_block ^= line.lstrip().startswith("```")
            prose = "" if in_code_block else TERMS.sub("", CODE_SPAN.sub("", line))
            violations += [
                f"{file.relative_to(ROOT)}:{number}: {match.group()}" for match in UNUSUAL_PROSE.finditer(prose)
            ]
    assert not violations, "\n".join(violations)


def test_first_docstring_lines_are_short_and_end_with_a_period(parse_folders: ParseFolders) -> None:
    violations = []
    for source in parse_folders(*LIBRARY):
        for node in source.nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first_paragraph = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
                if first_paragraph and not first_paragraph.endswith((".", ":", ")")):
                    violations.append(f"{source.path}:{node.lineno} {node.name}: {first_paragraph[-40:]!r}")
    assert not violations, "\n".join(violations)


def test_most_names_have_two_words(parse_folders: ParseFolders) -> None:
    names_by_kind: dict[str, set[tuple[str, str]]] = {}
    for source in parse_folders(*LIBRARY):
        for _, kind, name in iter_names(source.nodes):
            if not name.startswith("__"):
                names_by_kind.setdefault(kind, set()).add((source.path, name))
    functions, classes = names_by_kind["function"], names_by_kind["class"]
    names = functions | classes | names_by_kind["argument"] | names_by_kind["variable"]
    assert _share_of_long_names(names) >= MIN_LONG_NAME_SHARE
    assert _share_of_long_names(functions) >= MIN_LONG_FUNCTION_SHARE
    assert 1.0 - _share_of_long_names(classes) <= MAX_ONE_WORD_CLASS_SHARE


def _share_of_long_names(names: set[tuple[str, str]]) -> float:
    """Share of names with two or more words; one name counts once per file."""
    return sum(len(split_words(name)) > 1 for _, name in names) / len(names)


def _is_named_by_its_value(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether a decorator makes the name a noun: a property, a context manager for `with`, or an HTTP route."""
    decorators = [getattr(decorator, "func", decorator) for decorator in function.decorator_list]
    names = {ast.unparse(decorator).rpartition(".")[2] for decorator in decorators}
    return bool(names & NOUN_DECORATORS)


def test_functions_start_with_a_verb(parse_folders: ParseFolders) -> None:
    nouns, function_count = [], 0
    for source in parse_folders("rluf", "actors"):
        for node in source.nodes:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_named_by_its_value(node):
                continue
            if node.name.startswith("__") or node.name in FRAMEWORK_NAMES | FIELD_NAMES:
                continue
            function_count += 1
            if node.name.strip("_").split("_")[0] not in VERBS:
                nouns.append(f"{source.path}:{node.lineno} {node.name}")
    assert [noun for noun in nouns if noun.startswith(VERB_PACKAGES)] == []
    assert 1 - len(nouns) / function_count >= MIN_VERB_SHARE, "\n".join(nouns)
