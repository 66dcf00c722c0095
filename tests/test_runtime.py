"""The allocator's settings: made when asked, switched off by the environment, never made by an import."""

import os
import platform
import subprocess
import sys

import pytest

on_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")


def answer(code: str, **environment: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


KEEP = "from f2llm.runtime import keep_memory; print(keep_memory())"
# Page faults of taking and giving back 32 MB twenty times.
FAULTS = """
import resource
{before}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
bytearray(32 << 20)
start = faults()
for _ in range(20):
    bytearray(32 << 20)
print(faults() - start)
"""


@on_glibc
def test_memory_is_kept_unless_the_environment_says_no() -> None:
    assert answer(KEEP) == "True"
    assert answer(KEEP, F2LLM_MALLOC="0") == "False"
    assert answer(KEEP, F2LLM_MALLOC="1") == "True"


@on_glibc
def test_kept_memory_is_not_taken_again() -> None:
    kept = int(answer(FAULTS.format(before=KEEP)).split()[-1])
    given_back = int(answer(FAULTS.format(before="")))
    assert kept < 0.2 * given_back


@on_glibc
def test_importing_the_package_changes_nothing() -> None:
    """Neither the package nor its embedder: a library leaves its process as it is."""
    plain = int(answer(FAULTS.format(before="")))
    assert int(answer(FAULTS.format(before="import f2llm; f2llm.Embedder"))) > 0.9 * plain


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, f2llm; print(sorted({'torch', 'tokenizers', 'numpy', 'pyarrow'} & set(sys.modules)))"
    assert answer(code) == "[]"
