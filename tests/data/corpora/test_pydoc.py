"""The prose of a Python installation: parts of docstrings, files, and their order."""

from __future__ import annotations

import pickle
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import sentencex

from gluon_bert.data.corpora import pydoc
from gluon_bert.data.corpora.pydoc import Source, fingerprint, paragraphs, source_files

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def prose_of(tmp_path):
    """The paragraphs of a module that has this docstring."""

    def prose_of(docstring):
        path = tmp_path / "module.py"
        path.write_text(f"r'''{textwrap.dedent(docstring)}'''\n", "utf-8")
        return paragraphs(Source("pkg/module.py", path))

    return prose_of


LONG = "Each of these lines has been written to be as long as the lines of a real paragraph are. It has two."
NEXT = "The next paragraph is about something else, and as long as the first of them. It has two as well."
CURLY = "That is the caf\u00e9\u2019s \u201cbest\u201d \u2013 and the only \u2013 one."


def test_paragraph_becomes_one_line(prose_of):
    wrapped = "\n".join(textwrap.wrap(LONG, 60))
    assert prose_of(f"\n    {LONG}\n\n{textwrap.indent(NEXT, '    ')}\n") == [LONG, NEXT]
    assert prose_of(wrapped + "\n\n" + wrapped.replace("\n", "  \n")) == [LONG, LONG]


def test_first_line_joins_what_it_introduces(prose_of):
    assert prose_of(f"Show what the lines are.\n\n{LONG}") == [f"Show what the lines are. {LONG}"]


def test_text_on_both_sides_of_code_is_not_joined(prose_of):
    docstring = "Show what the lines are.\n\n>>> show(1)\nThis is one of the lines.\n\nThat is the end of it."
    assert prose_of(docstring) == ["Show what the lines are.", "That is the end of it."]


@pytest.mark.parametrize(
    "left_out",
    [
        ">>> print('This is what the code is for.')\nThis is what the code is for.",
        "Args:\n    x: The number of the things that are to be counted.\n        It is not less than zero.",
        ":param x: The number of the things that are to be counted.\n    It is not less than zero.",
        "x : int, optional",
        "count(x, y=1) -> the number of the things that are in the list.",
        "===== =====================================\nName  What it is for in the whole of this.\n===== ====",
        "+-----+\n| One | is what the first of these things is called. |\n+-----+",
        "Name      The name of the thing that is to be counted.",
        ".. code-block:: python\n\n    This is what the code is for, and it is not to be read.",
        ".. versionchanged:: 3.4\n   The number of the things is not less than zero.",
        "first()  -- this is the first of the functions\nsecond() -- this is the second of the functions",
        "Copyright 2001 by the people who have written this. All rights reserved.",
        "Permission is hereby granted to use this for any purpose that you may have.",
        "Defined in ../src/operator/tensor/elemwise_sum.cc:L155",
        "import this\nfor that in this: do_that(with_this, and_this=that)",
        "x = y + z * (w - 1.0) / 2",
        "a continuation of something that has been left out before this line.",
        "See https://www.python.org/ for what this is about.",
        r"The sum is :math:`\sum_{i} x_i` of what is in the list.",
    ],
    ids=lambda text: text[:24],
)
def test_paragraphs_that_are_left_out(prose_of, left_out):
    assert prose_of(f"{LONG}\n\n{left_out}\n\n{NEXT}") == [LONG, NEXT]


def test_literal_block_goes_with_its_sentence(prose_of):
    docstring = f"{LONG} Use it like this::\n\n    This is what the code is for. It is not text.\n\n{NEXT}"
    assert prose_of(docstring) == [LONG, NEXT]


@pytest.mark.parametrize("section", ["Parameters", "Returns", "See Also", "References"])
def test_a_section_ends_at_the_next_heading(prose_of, section):
    docstring = f"{LONG}\n\n{section}\n{'-' * len(section)}\nx : int\n    {LONG}\n\n    {LONG}"
    assert prose_of(docstring) == [LONG]
    assert prose_of(f"{docstring}\n\nNotes\n-----\n{NEXT}") == [LONG, NEXT]


def test_admonitions_and_items_are_text_without_their_marks(prose_of):
    assert prose_of(f"* {LONG}\n* {NEXT}\n\n.. note:: {LONG}\n\n.. warning::\n\n   {NEXT}") == [
        LONG, NEXT, LONG, NEXT,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("markup", "plain"),
    [
        ("It is ``None`` or a *new* **list** of `names` in it.", "It is None or a new list of names in it."),
        ("See :func:`os.walk` and :class:`~a.b.Walker` for it.", "See os.walk and Walker for it."),
        ("This is `the title <https://x.org>`_ of the page.", "This is the title of the page."),
        (
            "This is message in the paper [1]_ and in the book.",
            "This is message in the paper and in the book.",
        ),
        ("The `*args` and ``**kwargs`` are for a function.", "The *args and **kwargs are for a function."),
        ("It is the name of an ``object.__new__`` in this.", "It is the name of an __new__ in this."),
        ("It is a sub-class of an io.BytesIO and a list.", "It is a sub-class of an BytesIO and a list."),
        (CURLY, CURLY),
    ],
)
def test_markup_is_reduced_to_words(prose_of, markup, plain):
    assert prose_of(markup) == [plain]


def test_words_cut_at_a_line_end_are_joined(prose_of):
    assert prose_of(f"{LONG} It is a well-\nknown thing.") == [f"{LONG} It is a well-known thing."]
    assert prose_of(f"{LONG} It is pre-\nand post-war.") == [f"{LONG} It is pre- and post-war."]


def test_docstrings_of_everything_in_order(tmp_path):
    path = tmp_path / "module.py"
    path.write_text(
        textwrap.dedent(
            '''
            """This is the docstring of the module."""
            "This is a string that is not a docstring."
            class C:
                """This is the docstring of the class."""
                async def f(self):
                    """This is the docstring of the method."""
            if C:
                def g():
                    """This is the docstring of the function."""
            add_newdoc("pkg", "h", """
                This is the docstring of what is written in C.
                """)
            '''
        ),
        "utf-8",
    )
    names = ["the module", "the class", "the method", "the function", "what is written in C"]
    assert paragraphs(Source("pkg/module.py", path)) == [
        f"This is the docstring of {name}." for name in names
    ]


def test_the_language_reference_is_a_dict(tmp_path):
    path = tmp_path / "topics.py"
    path.write_text(repr({"b": NEXT, "a": LONG.replace("real", '"real"')}).join(["topics = ", "\n"]), "utf-8")
    assert paragraphs(Source("stdlib/pydoc_data/topics.py", path)) == [LONG, NEXT]


@pytest.mark.parametrize("content", [b"print 'Python 2'\n", b"\xff\xfe\x00", b"# coding: nonsense\n"])
def test_files_that_do_not_parse_are_skipped(tmp_path, content):
    path = tmp_path / "module.py"
    path.write_bytes(content)
    assert paragraphs(Source("pkg/module.py", path)) == []


def fake_installation(root, monkeypatch):
    """A standard library and a package below `root`, found in place of the real ones."""
    stdlib, site = root / "lib" / "python3", root / "venv" / "site"
    for path, text in {
        stdlib / "b.py": "This is the second of the modules.",
        stdlib / "a" / "z.py": "This is the first of the modules.",
        stdlib / "test" / "c.py": "This is a test and is not to be read.",
        stdlib / "a" / "tests" / "c.py": "This is a test too and is not to be read.",
        stdlib / "site-packages" / "pytest.py": "This is what others have installed here.",
        stdlib / "dist-packages" / "apt.py": "This is what Debian has installed here.",
        stdlib / "_sysconfigdata_x86.py": "This is where the machine has its compilers.",
        stdlib / "notes.txt": "This is not Python and is not to be read.",
        site / "known" / "__init__.py": "This is the package that is on the list.",
        site / "unknown" / "__init__.py": "This is a package that is not on the list.",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""{text}"""\nraise SystemExit("executed")\n', "utf-8")
    monkeypatch.setattr(pydoc, "PACKAGES", {"Known": ("known",), "Missing": ("missing_from_here",)})
    monkeypatch.setattr(pydoc.sysconfig, "get_paths", lambda: {"stdlib": str(stdlib)})
    monkeypatch.syspath_prepend(str(site))


def test_names_and_order_do_not_depend_on_the_place(tmp_path, monkeypatch):
    found = []
    for place in ("zzz/first", "a b c"):
        with monkeypatch.context() as here:
            fake_installation(tmp_path / place, here)
            sources = source_files()
            assert all(str(tmp_path / place) in str(source.path) for source in sources)
            found.append([(source.name, paragraphs(source)) for source in sources])
    assert found[0] == found[1]
    assert found[0] == [
        ("known/__init__.py", ["This is the package that is on the list."]),
        ("stdlib/a/z.py", ["This is the first of the modules."]),
        ("stdlib/b.py", ["This is the second of the modules."]),
    ]


def test_nothing_is_executed(tmp_path, monkeypatch):
    fake_installation(tmp_path, monkeypatch)  # each of its modules raises SystemExit
    assert sum(len(paragraphs(source)) for source in source_files()) == 3
    assert "known" not in sys.modules


def test_nothing_is_imported():
    code = (
        "import sys; from gluon_bert.data.corpora.pydoc import *; fingerprint(); before = set(sys.modules)\n"
        "for source in source_files():\n"
        "    if source.name.split('/')[0] in ('requests', 'tqdm'): paragraphs(source)\n"
        "new = {name.split('.')[0] for name in set(sys.modules)}\n"
        "assert not new & {'numpy', 'mxnet', 'requests', 'tqdm', 'pydoc_data', 'sentencex'}, new"
    )
    code = code.replace("import *", "import fingerprint, paragraphs, source_files")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


def test_works_in_another_process():
    assert pickle.loads(pickle.dumps(paragraphs)) is paragraphs
    source = Source("stdlib/x.py", Path("x.py"))
    assert pickle.loads(pickle.dumps(source)) == source


def test_fingerprint_is_stable_and_quick():
    start = time.perf_counter()
    first = fingerprint()
    # 20 ms on an idle core; the rest is for a busy machine.
    assert time.perf_counter() - start < 0.5
    assert first == fingerprint() and re.fullmatch("[0-9a-f]{16}", first)


@pytest.mark.parametrize("changed", ["python", "package", "rules"])
def test_fingerprint_changes_with_what_would_be_read(monkeypatch, changed):
    before = fingerprint()
    if changed == "python":
        monkeypatch.setattr(pydoc.platform, "python_version", lambda: "3.8.99")
    elif changed == "package":
        monkeypatch.setattr(pydoc.metadata, "version", lambda name: "99")
    else:
        monkeypatch.setattr(pydoc, "VERSION", 99)
    assert fingerprint() != before


def test_no_package_of_the_tests_is_read():
    roots = {source.name.split("/")[0] for source in source_files()}
    assert "stdlib" in roots and "numpy" in roots
    assert not roots & {"pytest", "_pytest", "gluonnlp", "ruff", "mypy", "hypothesis", "setuptools", "pip"}


@pytest.fixture(scope="module")
def real_corpus():
    """The multi-sentence paragraphs of this very installation."""
    found = dict.fromkeys(paragraph for source in source_files() for paragraph in paragraphs(source))
    return [text for text in found if len(list(sentencex.segment("en", text))) > 1]


def test_there_is_enough_to_train_on(real_corpus):
    words = sum(len(re.findall(r"\w+|[^\w\s]", text)) for text in real_corpus)
    assert words > 300_000


def test_the_real_corpus_is_clean(real_corpus):
    for text in real_corpus:
        assert text == " ".join(text.split())
        assert not re.search(r">>>|``\w|:\w+:`|^\w+ : |Defined in \S+:L|[Ll]icensed under|^\.\. ", text), text
