# SPDX-License-Identifier: Apache-2.0
"""The file in which tensors wait: what was written is read again, pieces are used again, and nothing is left of it."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lord_quant.errors import OutputError
from lord_quant.files.kept import KeptInFile
from lord_quant.files.scratch import PAGE, Piece, Scratch


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]


def some(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_tensors_of_any_kind_come_back_in_memory_of_their_own(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    given = [some((3, 5, 700), dtype, seed) for seed, dtype in enumerate(DTYPES)]
    given += [given[0].transpose(0, 2), torch.tensor(3.5), torch.empty(0, 4), torch.ones(2, requires_grad=True)]
    pieces = [scratch.write(tensor) for tensor in given]
    found = [scratch.read(piece) for piece in pieces]
    for tensor in found:
        tensor.zero_()
    for piece, wanted in zip(pieces, given, strict=True):
        own = scratch.read(piece)
        assert own.dtype == wanted.dtype and own.shape == wanted.shape and torch.equal(own, wanted)
        assert own.is_contiguous() and not own.requires_grad


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(1, 3), st.integers(0, 30)), max_size=40))
def test_pieces_in_use_never_share_bytes_and_free_ones_of_that_size_are_used_first(steps: list[tuple[int, int]]) -> None:
    """Each step writes so many pages, then frees one of what is there, if the second number names one."""
    scratch, held, most = Scratch(), list[tuple[Piece, torch.Tensor]](), Counter[int]()
    for number, (pages, gone) in enumerate(steps):
        tensor = some((pages * PAGE // 4 - number % 5,), torch.float32, number)
        held.append((scratch.write(tensor), tensor))
        now = Counter(piece.room for piece, _ in held)
        most |= now
        if gone < len(held):
            scratch.free([held.pop(gone)[0]])
    for piece, tensor in held:
        assert torch.equal(scratch.read(piece), tensor)
    ends = sorted((piece.start, piece.start + piece.room) for piece, _ in held)
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(ends))
    assert scratch.num_bytes == sum(size * count for size, count in most.items())


def test_what_is_let_go_leaves_its_room_once(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    first = KeptInFile([torch.ones(PAGE), torch.ones(1)], scratch)
    size = scratch.num_bytes
    assert size == 5 * PAGE
    assert len(first.take()) == 2 and first.take() == []
    del first  # taken already: its room is not free twice
    second, third = KeptInFile([torch.full((PAGE,), 2.0)], scratch), KeptInFile([torch.full((PAGE,), 3.0)], scratch)
    assert scratch.num_bytes == size + 4 * PAGE
    assert [float(kept.get()[0][-1]) for kept in (second, third)] == [2, 3]


def test_a_full_disk_is_named_and_the_room_is_not_lost(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    scratch.write(torch.zeros(PAGE))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6 * PAGE, limits[1]))
    try:
        with pytest.raises(OutputError, match=f"activations cannot be kept in '{tmp_path}': File too large"):
            KeptInFile([torch.ones(1), torch.ones(2 * PAGE)], scratch)  # a page, then eight of which one can be written
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    size = scratch.num_bytes
    kept = KeptInFile([torch.full((1,), 7.0), torch.full((2 * PAGE,), 8.0)], scratch)
    assert scratch.num_bytes == size
    assert [float(tensor[-1]) for tensor in kept.take()] == [7, 8]


def test_what_cannot_be_read_again_is_named(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    piece = scratch.write(torch.ones(PAGE))
    os.ftruncate(scratch._file.fileno(), PAGE)
    with pytest.raises(OutputError, match=f"activations cannot be read again from '{tmp_path}': the file ends too early"):
        scratch.read(piece)


def test_nothing_is_seen_of_it_and_nothing_left_when_the_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time, torch; from pathlib import Path; from lord_quant.files.scratch import Scratch; "
        "scratch = Scratch(Path(sys.argv[1])); scratch.write(torch.ones(10)); print('written', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    assert os.listdir(tmp_path) == []
    process.kill()
    process.wait()
    assert os.listdir(tmp_path) == []
