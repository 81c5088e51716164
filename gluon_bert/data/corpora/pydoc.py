"""English prose of the Python installation: docstrings and the reference. Imports none of its modules.

The text is the language reference of `help()` (pydoc_data.topics), and the docstrings of the standard library
and of this project's dependencies. Code, tables, parameter lists and markup are left out; what remains is
paragraphs of running text.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
import platform
import re
import sysconfig
import warnings
from importlib import metadata
from pathlib import Path
from typing import Iterator, NamedTuple

# Part of the fingerprint. Increase it when the same files would give other paragraphs.
VERSION = 1

# Distribution -> the folders it installs. A list of our own, not a walk over the installed metadata: the
# corpus is then the same in a checkout and after installing, and whatever else shares the environment.
# The two MXNets install the same folder.
PACKAGES: dict[str, tuple[str, ...]] = {
    "contourpy": ("contourpy",),
    "cycler": ("cycler",),
    "fonttools": ("fontTools",),
    "graphviz": ("graphviz",),
    "idna": ("idna",),
    "kiwisolver": ("kiwisolver",),
    "matplotlib": ("matplotlib", "mpl_toolkits"),
    "mxnet": ("mxnet",),
    "mxnet-cu112": ("mxnet",),
    "numpy": ("numpy",),
    "packaging": ("packaging",),
    "pillow": ("PIL",),
    "pyparsing": ("pyparsing",),
    "python-dateutil": ("dateutil",),
    "requests": ("requests",),
    "sentencex": ("sentencex",),
    "tqdm": ("tqdm",),
    "urllib3": ("urllib3",),
}

# Left out: tests, parts that Linux distributors remove or add, and files that name a machine.
_LEFT_OUT = re.compile(
    r"tests?|site-packages|dist-packages|__pycache__|_sysconfig\w*|config-.*|sitecustomize|usercustomize|"
    r"_?distutils.*|ensurepip|idlelib|lib2to3|tkinter|turtle|turtledemo"
)

# The same documents again, for the symbolic twins of mxnet.ndarray.
_TWINS = "mxnet/symbol/"
_TOPICS = "stdlib/pydoc_data/topics.py"


class Source(NamedTuple):
    """One file; its name says the same on every machine ("stdlib/json/decoder.py"), its path does not."""

    name: str
    path: Path


def source_files() -> list[Source]:
    """Return the files to read, sorted by name."""
    sources = _python_files(Path(sysconfig.get_paths()["stdlib"]), "stdlib")
    for folder in sorted({folder for folders in PACKAGES.values() for folder in folders}):
        spec = importlib.util.find_spec(folder)
        for root in (spec and spec.submodule_search_locations) or []:
            sources += _python_files(Path(root), folder)
    return sorted(source for source in set(sources) if not source.name.startswith(_TWINS))


def _python_files(root: Path, prefix: str) -> list[Source]:
    sources = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not _LEFT_OUT.fullmatch(name)]
        inside = Path(prefix, Path(folder).relative_to(root)).as_posix()
        for name in files:
            if name.endswith(".py") and not _LEFT_OUT.fullmatch(name[:-3]):
                sources.append(Source(f"{inside}/{name}", Path(folder, name)))
    return sources


def fingerprint() -> str:
    """Names what `source_files` and `paragraphs` would give here, without reading a file of it.

    Made of the versions of Python, of the installed packages of the list and of these rules.
    """
    parts = [f"rules {VERSION}", f"python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            parts.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def paragraphs(source: Source) -> list[str]:
    """Return the prose of one file, in its order; a paragraph is one line of plain words."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source.path.read_bytes())
    except (SyntaxError, ValueError):
        # Installed packages contain templates and files for other versions of Python. They do not parse, and
        # the user cannot change that.
        return []
    texts = _topics(tree) if source.name == _TOPICS else _docstrings(tree.body, tree)
    return [paragraph for text in texts for paragraph in _prose(inspect.cleandoc(text))]


def _topics(tree: ast.Module) -> Iterator[str]:
    """Yield the values of the dict in pydoc_data/topics.py. Double quotes mark code there."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield re.sub(r'"([^"\s]+)"', r"``\1``", text)


def _docstrings(body: list[ast.stmt], owner: ast.AST) -> Iterator[str]:
    """Return the docstrings of a module, its classes and functions, and those that `add_newdoc` adds."""
    if isinstance(owner, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(owner, clean=False)
        if text:
            yield text
    for node in body:
        for field in ("body", "orelse"):
            if isinstance(getattr(node, field, None), list):
                yield from _docstrings(getattr(node, field), node)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            if getattr(function, "id", getattr(function, "attr", "")) in ("add_newdoc", "add_docstring"):
                for part in ast.walk(node.value):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value:
                        yield part.value


# These lines open a body that is not prose. Lines indented deeper than the opening are skipped.
_OPENS_OTHER = re.compile(
    r"(args|arguments|parameters|params|returns?|raises?|yields?|attributes|keyword arguments|options|"
    r"keyword args|keywords|usage|examples?|methods|see also|references|inputs?|outputs?)\s*:$|"
    r"[:@](param|type|return|rtype|raise|arg|ivar|cvar|var|vartype|keyword|key|kwarg|except|since)|"
    r"\.\. ",
    re.I,
)
_ADMONITION = re.compile(r"\.\. (note|warning|important|tip|caution|hint|attention|admonition)::\s*", re.I)
_BULLET = re.compile(r"([*+•-]|\(?\d{1,2}[.)]|\(?[a-z][)])\s+(?=\S)")
_RULE = re.compile(r"([-=~^\"'#*+.`_:])\1{2,}$")
_OTHER_SECTIONS = {
    "parameters", "other parameters", "returns", "return", "yields", "receives", "raises", "warns",
    "see also", "references", "attributes", "methods", "inputs", "outputs", "input", "output", "args",
    "arguments", "properties", "example", "usage", "bibliography", "keyword arguments",
}  # fmt: skip


class _Chunk(NamedTuple):
    """Lines that could be one paragraph; `follows` when only blank lines part it from the chunk before."""

    lines: list[str]
    follows: bool


def _prose(text: str) -> list[str]:
    """Return the paragraphs of one docstring; one of a single sentence is joined to its neighbour.

    A docstring's first line is its first sentence, although a blank line follows.
    """
    found: list[str] = []
    previous = ""
    for lines, follows in _chunks(text):
        paragraph = _paragraph(lines)
        if paragraph:
            both_long = _SENTENCE_BREAK.search(previous) and _SENTENCE_BREAK.search(paragraph)
            if follows and previous and not both_long:
                paragraph = f"{found.pop()} {paragraph}"
            found.append(paragraph)
        previous = paragraph
    return found


def _chunks(text: str) -> Iterator[_Chunk]:
    """Cuts what may be prose at blank lines, bullets and changes of indent."""
    chunk: list[str] = []
    indent = 0
    follows = False
    for here, line in _outside_other_text(text):
        bullet = _BULLET.match(line or "")
        if chunk and (not line or bullet or here != indent):
            yield _Chunk(chunk, follows)
            chunk, follows = [], True
        if line is None:
            follows = False
        elif line:
            if bullet:
                here, line = here + bullet.end(), line[bullet.end() :]
            if not chunk:
                follows = follows and here == indent and not bullet
                indent = here
            chunk.append(line)
    if chunk:
        yield _Chunk(chunk, follows)


def _outside_other_text(text: str) -> Iterator[tuple[int, str | None]]:
    """Yield each line's indent and words.

    None for a line of code, of a parameter list, of a heading and so on.
    """
    lines = [(len(line) - len(line.lstrip()), line.strip()) for line in text.expandtabs().splitlines()]
    opened_at = None  # the indent of the line that opened the body that is being passed over
    in_section = in_doctest = False
    for (here, line), (next_indent, following) in zip(lines, lines[1:] + [(0, "")]):
        if not line:
            in_doctest = False
            yield here, ""
            continue
        heading = _RULE.match(following) and not _RULE.match(line) and len(following) >= len(line) - 2
        if heading:
            in_section, opened_at = line.lower() in _OTHER_SECTIONS, None
        if opened_at is not None and here <= opened_at:
            opened_at = None
        in_doctest = in_doctest or line.startswith(">>>")
        admonition = _ADMONITION.match(line)
        if heading or in_section or in_doctest or opened_at is not None or _RULE.match(line):
            yield here, None
        elif admonition:
            yield here, None
            if admonition.end() < len(line):
                yield next_indent, line[admonition.end() :]
        elif _OPENS_OTHER.match(line):
            opened_at = here
            yield here, None
        else:
            if line.endswith("::"):
                opened_at = here
            yield here, line


_MARKUP = [
    (re.compile(r"\\ |\\(?=[^\w\s])|(?<=`)\\"), ""),
    (re.compile(r"(?<![`\w])`([^`'\s]+)'"), r"'\1'"),
    (re.compile(r"\s*\[#?\w{0,12}\]_|\s\[\d\d?\](?=[\s.,;:)]|$)"), ""),
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:)?`([^`<]+?)\s*<[^`>]+>`_{0,2}"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:)?`!?~[^`]*?([^`.]+)`"), r"\1"),
    (re.compile(r"(?::[\w:+-]+:)?`[!.]?([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])(\*\*?)(?=\S)([^*]+?)(?<=\S)\1(?![\w*])"), r"\2"),
    (re.compile(r"(?<![\w.])([A-Za-z][A-Za-z0-9-]*[A-Za-z0-9])_(?=[\s.,;:)]|$)"), r"\1"),
    # Sentence splitters would end a sentence at the full stop of "io.BytesIO".
    (re.compile(r"\b(?:[A-Za-z_]\w+\.)+(?=_|[A-Z]\w)"), ""),
    (re.compile(r" (?=[.,;](?: |$))"), ""),
    (re.compile(r"(?<=[a-z]{2}-) (?!and |or |to )(?=[a-z])"), ""),
]
_NOT_PROSE = re.compile(
    r"(?i:permission (is hereby|to use)|licen[sc]ed? (to|under|for)|redistribut|copyright|warrant[yi])|"
    r"Defined in \S+:L\d|TODO|FIXME|XXX|%\(|Convenience fluent method|^[a-z_]\w* ?: |"
    r"\\[A-Za-z]|[$]\w|\w\{|>>>|://|\S   +\S|( -- .*){2}|:\w+:`|``\w|^[\w.]+\(.*?\) ->",
)
# A word of letters only, within quotes (the curly ones are \u2018 to \u201d) and punctuation.
_PLAIN = re.compile(
    r"[\"'(\[\u2018\u201c]*([^\W\d_][^\W\d_A-Z]*|[A-Z]{2,}s?)(['\u2019-][^\W\d_]+)*(\(e?s\))?"
    r"[)\]\"'\u2019\u201d.,;:!?\u2026]*$|[\u2013\u2014-]+$"
)
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and any are as at be been but by can do does for from has have if in into is it its may must no"
        " not of on only or other should so such than that the their them then there these they this to used"
        " using was we when where which while will with without would you your",
    )
)
_STARTS = re.compile(r"[\"'(\u201c]*[A-Z]|[`*:]|\w*_\w*\s|\w+(\.\w+)*\(")
_ENDS = re.compile(r"[.!?\u2026][)\]\"'\u2019\u201d]*$")
_SENTENCE_BREAK = re.compile(r"(?<=[a-z0-9)\]`*\"'][.!?]) +(?=[A-Z\"'(`*:])")


def _paragraph(lines: list[str]) -> str:
    """One chunk as plain words, or "" when it is not running text."""
    if len(lines) > 1 and sum(map(len, lines[:-1])) < 40 * (len(lines) - 1):
        return ""
    text = " ".join(lines)
    if not _STARTS.match(text):
        return ""
    if not _ENDS.search(text.rstrip("`*_")):
        # The last sentence leads to a list or to code that is left out here.
        ends = [match.start() for match in _SENTENCE_BREAK.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    for pattern, plain in _MARKUP:
        text = pattern.sub(plain, text)
    if _NOT_PROSE.search(text):
        return ""
    words = text.split()
    plain_words = sum(1 for word in words if _PLAIN.match(word))
    function_words = sum(1 for word in words if word.lower().strip("(),.") in _FUNCTION_WORDS)
    if len(words) < 5 or plain_words < 0.75 * len(words) or function_words < 0.2 * len(words):
        return ""
    return " ".join(words)
