"""Every variant of the Triton kernels compiles for sm_80, sm_90 and sm_100 as the rows' memory traffic wants it."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from tests.kernels.aot import ALIGNED, ARCHITECTURES, Variant, compiled, variants


def _prepare(cache: str) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    """A process without the interpreter, with an empty cache."""
    cache = str(tmp_path_factory.mktemp("triton"))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (cache,)) as executor:
        yield executor


# What the default objective runs, and the one kernel that belongs to JSD alone.
FEW = [
    Variant("statistics", "fp32", "forward_kl"),
    Variant("gradients", "fp32", "forward_kl"),
    Variant("mixture", "fp32"),
]


def _assert_lean(compiler: ProcessPoolExecutor, variant: Variant, architecture: int) -> None:
    result = compiler.submit(compiled, variant, architecture).result()
    assert result.stack == 0
    assert result.registers <= 128  # so that a multiprocessor holds at least two programs of 8 warps
    # All of a block's accesses, once for whole blocks and once for the rest.
    assert result.vector_loads == 2 * variant.models * variant.vectors
    assert result.vector_stores == (2 * variant.vectors if variant.kernel == "gradients" else 0)
    assert result.barriers_in_loops == 0


@pytest.mark.parametrize("variant", FEW, ids=str)
@pytest.mark.fast_cases(1)
def test_the_default_kernels_do_not_spill_and_load_vectors(compiler: ProcessPoolExecutor, variant: Variant) -> None:
    _assert_lean(compiler, variant, 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("variant", variants(), ids=str)
def test_kernels_do_not_spill_and_load_vectors(
    compiler: ProcessPoolExecutor, variant: Variant, architecture: int
) -> None:
    _assert_lean(compiler, variant, architecture)


@pytest.mark.parametrize("kernel", ["statistics", "gradients"])
def test_whole_blocks_of_a_ragged_vocabulary_load_vectors_too(compiler: ProcessPoolExecutor, kernel: str) -> None:
    variant = Variant(kernel, "fp32", "forward_kl")
    known = tuple(name for name in ALIGNED if name != "columns")
    result = compiler.submit(compiled, variant, 90, known).result()
    assert result.vector_loads == variant.models * variant.vectors


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["statistics", "gradients"])
@pytest.mark.parametrize("divergence", ["none", "forward_kl", "reverse_kl", "jsd"])
def test_exponentials_at_another_temperature_are_computed_where_needed_only(
    compiler: ProcessPoolExecutor, kernel: str, divergence: str
) -> None:
    lean, full = (
        compiler.submit(compiled, Variant(kernel, "fp32", divergence, unscaled), 90).result().exponentials
        for unscaled in (False, True)
    )
    assert lean < full
