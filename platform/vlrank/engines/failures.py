"""Why an engine did not start, ran out of memory or died, as one message with a remedy."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from vlrank.engines.resources import RESTARTS
from vlrank.errors import UserError, causes, user_error_in

_OUT_OF_MEMORY = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "OutOfMemoryError",
    "No available memory for the cache blocks",
    "is larger than the maximum number of tokens that can be stored in KV cache",
    "KV cache is needed, which is larger than the available KV cache memory",
    "less than desired GPU memory utilization",
    "Not enough memory",
)
_ERROR = re.compile(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)$")
_PREFIX = re.compile(r"^(?:\x1b\[[\d;]*m|\([^()]*pid=\d+\)|(?:ERROR|WARNING) [\d-]+ [\d:]+ \[[^]]*\]|\s)*")
_SECONDARY = ("initialization failed", "root cause", "failed to start")  # another process has the error
_USER_ERROR = re.compile(r"^(?:vlrank\.errors\.)?UserError: (.*)\Z", re.MULTILINE | re.DOTALL)


def explained(error: BaseException) -> BaseException:
    """A `UserError` for what the user can mend, found anywhere in the chain of causes; else the error itself."""
    if found := user_error_in(error):
        return found
    text = "\n".join(f"{type(link).__name__}: {link}" for link in causes(error))
    if full := _out_of_memory(text.splitlines()):
        return full
    if "error raised in its creation task" in text:  # Ray hands on the traceback of a constructor as text
        if match := _USER_ERROR.search(text):
            problem, _, remedy = match[1].strip().rpartition("\n")
            return UserError(problem, remedy) if problem else UserError(remedy)
        return _not_started(last_error(text.splitlines()) or str(error))
    if "ActorDiedError" in text:
        return UserError(
            f"an engine's process died {RESTARTS + 1} times",
            "If its GPU's or the host's memory runs out, lower engine.max_model_len or engine.batch_size; "
            "VLRANK_VERBOSE=1 shows what it printed. What is committed so far is kept.",
        )
    return error


def _out_of_memory(lines: Iterable[str]) -> UserError | None:
    line = next((line.strip() for line in lines if any(sign in line for sign in _OUT_OF_MEMORY)), None)
    if line is None:
        return None
    return UserError(
        f"the engine ran out of memory: {_PREFIX.sub('', line)[:300]}",
        "Lower engine.max_model_len or engine.batch_size, give each engine more of a GPU (engine.gpus), share the "
        "model between GPUs (engine.tensor_parallel_size), or change engine.gpu_memory_utilization; on a CPU, "
        "VLLM_CPU_KVCACHE_SPACE is the cache's size in GiB. What is committed so far is kept.",
    )


def _not_started(why: str) -> UserError:
    return UserError(f"an engine did not start: {why[:1000]}", "VLRANK_VERBOSE=1 shows all that it prints.")


@contextmanager
def root_cause() -> Iterator[None]:
    """Around the start of vLLM, whose processes print what goes wrong in them; their parent only learns that it did.

    Raises:
        UserError: in place of any other exception of the block, with what was printed.
    """
    printed: deque[str] = deque(maxlen=2000)
    restores = [_copied(stream, printed) for stream in (1, 2)]
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        for restore in restores:
            restore(5)  # the processes have ended, and their last lines are on the way
        own = f"{type(error).__name__}: {error}"
        secondary = any(words in own for words in _SECONDARY)
        lines = [*printed, own]
        raise _out_of_memory(lines) or _not_started((last_error(lines) if secondary else None) or own) from error
    finally:
        for restore in restores:
            restore(0)


def last_error(lines: Iterable[str]) -> str | None:
    """The last error that a traceback ended with, without those that only say that another process failed."""
    found = None
    for line in lines:
        match = _ERROR.match(_PREFIX.sub("", line).rstrip())
        if match and not any(words in match[2] for words in _SECONDARY):
            found = f"{match[1]}: {match[2]}"
    return found


def _copied(stream: int, lines: deque[str]) -> Callable[[float], None]:
    """Note what this process and its children write to a file descriptor, and pass it on.

    Returns:
        Ends it for this process, and waits so many seconds for the children's last lines.
    """
    original = os.dup(stream)
    read, write = os.pipe()
    os.dup2(write, stream)
    os.close(write)

    def pass_on() -> None:
        with os.fdopen(read, "rb") as pipe:
            for line in pipe:  # until the last child ends
                lines.append(line.decode(errors="replace"))
                os.write(original, line)
        os.close(original)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    redirected = True

    def restore(seconds: float) -> None:
        nonlocal redirected
        if redirected:
            os.dup2(original, stream)
            redirected = False
            thread.join(seconds)

    return restore
