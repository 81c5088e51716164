"""Programs of their own that use headers of the compiled operators."""

import subprocess

import pytest

from gluon_bert.ops.build import FLAGS, SOURCES, BuildError, find_compiler


def compiled_program(folder, source, *further_flags):
    """Compile a program; return a function from its input to its output. Skip the test without a compiler."""
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    (folder / "program.cc").write_text(source, "utf-8")
    flags = [each for each in FLAGS if each not in ("-shared", "-fPIC")]
    command = [compiler, *flags, *further_flags, f"-I{SOURCES}", "-o", "program", "program.cc"]
    subprocess.run(command, cwd=folder, check=True)
    return lambda given="": subprocess.check_output([str(folder / "program")], input=given.encode()).decode()
