"""Conversations to text with the model's own Jinja template, which is untrusted: it is run with fuel and size limits.

Rendered by ``minijinja``, an interpreter that has no access to Python objects and counts instructions, so a template
can neither reach the process nor run on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NoReturn, Protocol

import minijinja

from orcd_jax.errors import ErrorCode, OrcdError

CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1024 * 1024
MAX_OUTPUT_CHARS = 4 * 1024 * 1024
FUEL = 1_000_000  # instructions, and memory as the interpreter charges it; SmolLM2's template needs about 40 a message


class Message(Protocol):
    """One turn of a conversation."""

    @property
    def role(self) -> str:
        """``system``, ``user``, ``assistant`` or another role the template knows."""

    @property
    def content(self) -> str:
        """What was said."""


class ChatTemplate:
    """Owns one compiled template. Its environment is not shared between threads: ``render`` makes its own."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        """Compiles the template.

        Raises:
          OrcdError: MODEL_LOAD_FAILED, when it is too large or not valid.
        """
        if len(source.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
            raise _invalid(f"it is larger than {MAX_TEMPLATE_BYTES} bytes")
        self._source = source
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._environment()
        except minijinja.TemplateError:
            raise _invalid("it is not a valid template") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the model was trained to see it.

        Args:
          messages: the turns, oldest first.
          add_generation_prompt: end with the start of the assistant's turn.

        Raises:
          OrcdError: INVALID_PARAMS, when the template refuses the conversation or needs too much time or memory.
        """
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text: str = self._environment().render_template(
                "chat", messages=turns, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except (minijinja.TemplateError, ValueError, TypeError, RecursionError) as error:
            reason = "needs too many steps" if "out of fuel" in str(error) else "refuses this conversation"
            raise OrcdError(
                ErrorCode.INVALID_PARAMS,
                f"the model's chat template {reason}: check the roles and their order, or send a plain prompt",
                field="chat",
            ) from None
        if len(text) > MAX_OUTPUT_CHARS:
            raise OrcdError(
                ErrorCode.INVALID_PARAMS,
                f"the rendered chat is longer than {MAX_OUTPUT_CHARS} characters",
                field="chat",
            )
        return text

    def _environment(self) -> minijinja.Environment:
        environment = minijinja.Environment(
            templates={"chat": self._source},
            filters={"tojson": _to_json},
            globals={"raise_exception": _raise_exception},
            auto_escape_callback=_never_escape,
            fuel=FUEL,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        # Templates compile when they are first used; an unused variable costs nothing.
        environment.undeclared_variables_in_template("chat")
        return environment


def _never_escape(_: str) -> bool:
    return False


def _raise_exception(message: str = "") -> NoReturn:
    raise ValueError(message[:200])


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _invalid(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"the chat template cannot be used: {problem}", field="chat_template")
