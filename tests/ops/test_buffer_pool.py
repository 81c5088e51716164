"""The pool of the compiled operators, in a program of its own that counts its allocations."""

import pytest
from support.programs import compiled_program

PROGRAM = """
#include <cstdio>
#include <set>
#include <vector>
#include "buffer_pool.h"
using gluon_bert::PooledBuffer;

int allocations = 0;
std::set<void*> blocks;
extern "C" void* __real_aligned_alloc(size_t, size_t);
extern "C" void __real_free(void*);
extern "C" void* __wrap_aligned_alloc(size_t line, size_t size) {
  ++allocations;
  return *blocks.insert(__real_aligned_alloc(line, size)).first;
}
extern "C" void __wrap_free(void* block) {
  blocks.erase(block);
  __real_free(block);
}

// A step holds five buffers at once, in proportion to its tokens.
void step(size_t tokens) {
  std::vector<PooledBuffer> held;
  for (size_t units : {4096, 512, 512, 2048, 16}) held.emplace_back(units * tokens);
}

// Prints the allocations for a small buffer beside a large free one, and for another one. Then for each
// round the allocations and the blocks that exist.
int main() {
  { PooledBuffer large(1 << 20); }
  for (int i = 0; i < 2; ++i) {
    allocations = 0;
    { PooledBuffer small(10); }
    std::printf("%d ", allocations);
  }
  for (int i = 0; i < 4; ++i) {
    allocations = 0;
    for (size_t tokens : {1000, 4000, 3000, 1000, 4400, 2000}) step(tokens);
    std::printf("%d %zu ", allocations, blocks.size());
  }
}
"""


@pytest.fixture(scope="module")
def allocations(tmp_path_factory):
    run = compiled_program(tmp_path_factory.mktemp("pool"), PROGRAM, "-Wl,--wrap=aligned_alloc,--wrap=free")
    return [int(count) for count in run().split()]


def test_pool_gives_no_large_block_for_a_small_one_and_reuses_small_ones(allocations):
    assert allocations[:2] == [1, 0]


def test_pool_allocates_nothing_for_lengths_that_have_occurred(allocations):
    assert allocations[2] >= 5
    assert allocations[-2] == 0


def test_pool_keeps_few_more_blocks_than_a_step_holds(allocations):
    assert 5 <= allocations[-1] <= 8
