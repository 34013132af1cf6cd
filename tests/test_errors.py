"""A `UserError` is found however it was wrapped on its way, and shown as one message with exit code 2."""

from __future__ import annotations

import errno
import os

import click
import pytest
from ray.exceptions import RayTaskError
from ray.train import WorkerGroupError

from vlrank.errors import UserError, causes, user_error_in
from vlrank.options import main

ERROR = UserError("item 7 has no text", "Look at it with `vlrank inspect`.")


def chained(cause: BaseException) -> BaseException:
    try:
        try:
            raise cause
        except BaseException:
            raise KeyError("while that was handled")  # noqa: B904
    except KeyError as error:
        return error


def explicitly(cause: BaseException) -> BaseException:
    error = RuntimeError("task failed")
    error.__cause__ = cause
    return error


def in_a_task(cause: Exception) -> BaseException:
    return RayTaskError("work", "Traceback of the task", cause).as_instanceof_cause()


def in_a_worker(cause: Exception) -> BaseException:
    lost = RuntimeError("connection closed")
    return WorkerGroupError("cut", {0: lost, 1: cause})


WRAPPERS = [chained, explicitly, in_a_task, in_a_worker, lambda cause: ExceptionGroup("two", [ValueError(), cause])]


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_user_error_is_found_and_shown_as_one_message(wrap: object, capsys: pytest.CaptureFixture[str]) -> None:
    wrapped = explicitly(wrap(ERROR))  # type: ignore[operator]
    found = user_error_in(wrapped)
    assert found is not None
    assert (found.problem, found.remedy) == (ERROR.problem, ERROR.remedy)

    @click.command()
    def command() -> None:
        raise wrapped

    with pytest.raises(SystemExit) as ended:
        main(command, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {ERROR}\n"


def test_what_was_replaced_on_purpose_is_no_cause() -> None:
    error = chained(ERROR)
    assert user_error_in(error) is ERROR
    error.__suppress_context__ = True  # raise ... from None
    assert user_error_in(error) is None


def test_causes_that_point_to_each_other_end() -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_file_that_the_system_refuses_is_one_message(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def command() -> None:
        raise RuntimeError("task failed") from OSError(number, os.strerror(number), "/data/items.parquet")

    with pytest.raises(SystemExit) as ended:
        main(command, [])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: /data/items.parquet: {os.strerror(number)}\n")
    assert user_error_in(FileNotFoundError(errno.ENOENT, "No such file", "/x")) is None, "a fault of ours, perhaps"
    assert user_error_in(PermissionError(errno.EPERM, "Operation not permitted")) is None, "of no file"
