"""Chat templates rendered in processes of their own, under limits of time and memory.

A checkpoint's template and a request's messages together may loop for minutes or make gigabytes;
Python cannot end a thread that does. There are a few such processes, so that one hard conversation
does not hold up the next; they start with the server and are kept.
"""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

from jaxmoe.common import limited_child
from jaxmoe.common.errors import JaxMoeError, RequestError
from jaxmoe.common.limited_child import LimitedChild

START_TIMEOUT_S = 60.0  # Python and Jinja: 0.3 s on an idle machine
RENDER_TIMEOUT_S = 10.0  # a megabyte of messages takes some milliseconds
# Address space: Python and Jinja take 0.1 GB of it, the longest body and its text about as much.
MEMORY_BYTES = 1 << 30
STACK_BYTES = 8 << 20
CPU_S = 20  # should the parent be gone
PROCESSES = 2
_CODE = "from jaxmoe.text.template_process import child; child()"


class TemplateProcess:
    """Renders one template. Thread-safe."""

    def __init__(self, source: str, timeout_s: float = RENDER_TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        children = [LimitedChild(_CODE, lambda: source, START_TIMEOUT_S) for _ in range(PROCESSES)]
        self._children = children
        self._idle: queue.LifoQueue[LimitedChild] = queue.LifoQueue()
        for child in children:
            self._idle.put(child)

    def render(self, variables: Mapping[str, Any]) -> str:
        """Raises RequestError where the template refuses the messages or takes too much for them,
        and CapacityError where no process can be started.
        """
        child = self._idle.get()
        try:
            text, error = child.ask(dict(variables), self._timeout_s)
        except TimeoutError:
            raise RequestError(
                f"the chat template took more than {self._timeout_s:g} s for these messages; send "
                "less"
            ) from None
        except EOFError:
            raise RequestError(
                "the chat template took too much memory for these messages; send less"
            ) from None
        finally:
            self._idle.put(child)
        if error is not None:
            raise RequestError(error)
        return text

    def start(self) -> None:
        """Now instead of at first use, so that no request waits for it."""
        for child in self._children:
            child.start()

    def close(self) -> None:
        for child in self._children:
            child.close()

    @property
    def pids(self) -> list[int]:
        return [child.pid for child in self._children if child.pid is not None]


def child() -> None:
    """A child: a template's source, then variables for ever."""
    from jaxmoe.text.chat_template import CompiledTemplate

    def begin(source: str):
        template = CompiledTemplate(source)

        def answer(variables: dict[str, Any]) -> tuple[str | None, str | None]:
            try:
                return template.render(variables), None
            except JaxMoeError as error:
                return None, str(error)
            except MemoryError:
                return None, "the chat template took too much memory for these messages; send less"

        return answer

    limited_child.serve(begin, memory_bytes=MEMORY_BYTES, stack_bytes=STACK_BYTES, cpu_s=CPU_S)
