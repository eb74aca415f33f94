# The part of atheris (https://pypi.org/project/atheris/, no types of its own) that the fuzzing harness uses.

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

def instrument_imports(
    include: Sequence[str] = ..., exclude: Sequence[str] = ..., enable_loader_override: bool = ...
) -> AbstractContextManager[None]: ...
def Setup(args: Sequence[str], test_one_input: Callable[[bytes], None], **options: bool) -> list[str]: ...  # noqa: N802
def Fuzz() -> None: ...  # noqa: N802
