"""How the compiled operators divide rows among threads, in a program of its own."""

import itertools

import numpy as np
import pytest
from support.programs import compiled_program

PROGRAM = """
#include <cstdio>
#include "even_runs.h"

// Reads `count`, the number of rows and their lengths, until the input ends. Prints the ends of the runs.
int main() {
  int count, size;
  while (std::scanf("%d %d", &count, &size) == 2) {
    std::vector<int> lengths(size);
    for (int& length : lengths) std::scanf("%d", &length);
    int first = 0;
    for (gluon_bert::Run run : gluon_bert::even_runs(lengths, {0, size}, count)) {
      if (run.first != first) return 1;
      std::printf("%d ", first = run.last);
    }
    std::printf("\\n");
  }
}
"""


@pytest.fixture(scope="module")
def even_runs(tmp_path_factory):
    """Return a function that divides rows for several pairs of a number of runs and lengths of rows.

    It returns the tokens of each run of each pair.
    """
    run = compiled_program(tmp_path_factory.mktemp("runs"), PROGRAM)

    def divide(cases):
        printed = run("\n".join(" ".join(map(str, [n, len(lengths), *lengths])) for n, lengths in cases))
        ends = [[int(end) for end in line.split()] for line in printed.splitlines()]
        assert [each[-1] for each in ends] == [len(lengths) for _, lengths in cases]
        return [
            [sum(lengths[a:b]) for a, b in zip([0, *each], each)] for each, (_, lengths) in zip(ends, cases)
        ]

    return divide


def least_longest(count, lengths):
    """Return the tokens of the longest run in the best of all divisions."""
    divisions = (
        [0, *inner, len(lengths)]
        for number in range(min(count, len(lengths)))
        for inner in itertools.combinations(range(1, len(lengths)), number)
    )
    return min(max(sum(lengths[a:b]) for a, b in zip(ends, ends[1:])) for ends in divisions)


def test_even_runs_are_the_best_of_all_divisions(even_runs):
    rng = np.random.default_rng(0)
    cases = [
        (int(rng.integers(1, 6)), rng.integers(0, 20, size=rng.integers(1, 9)).tolist()) for _ in range(200)
    ]
    for (count, lengths), runs in zip(cases, even_runs(cases)):
        assert len(runs) <= count
        assert max(runs) == least_longest(count, lengths)


def test_even_runs_of_sixteen_pairs_differ_by_one_row_at_most(even_runs):
    lengths = [128] * 13 + [97, 110, 64]
    (halves, each) = even_runs([(2, lengths), (16, lengths)])
    assert abs(halves[0] - halves[1]) <= 128
    assert each == lengths


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [5], [0, 7, 0]])
def test_even_runs_of_empty_rows_have_all_rows(even_runs, lengths):
    for count in (1, 2, 5):
        (runs,) = even_runs([(count, lengths)])
        assert sum(runs) == sum(lengths)
