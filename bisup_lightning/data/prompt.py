"""The system prompt whose keys and values stay at high precision (paper §4.5)."""

from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from bisup_lightning.errors import UserError


@dataclass(frozen=True)
class Prompt:
    """What stands before every sequence in calibration, evaluation and generation.

    Args:
        kind: `bos`: the model's first token, for base models; `system`: the chat template up to the user's words, with
            `text` as the system message if given, for instruct models; `text`: exactly `text`; `none`.
        text: See `kind`.
    """

    kind: Literal["bos", "system", "text", "none"] = "bos"
    text: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "text" and not self.text:
            raise ValueError("prompt.text must be given when prompt.kind is text")
        if self.kind == "bos" and self.text is not None:
            raise ValueError("prompt.text has no place in a prompt.kind of bos; choose text or system for it")

    def ids(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[int]:
        """The prompt's token ids.

        Raises:
            UserError: If the model has no such prompt.
        """
        if self.kind == "none":
            return []
        if self.kind == "text":
            return list(tokenizer(self.text)["input_ids"])
        if self.kind == "system":
            return self._system(tokenizer)
        bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.bos_token_id
        if bos is None:
            raise UserError("prompt.kind: this model has no BOS token; choose system, text or none")
        return [bos]

    def _system(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        if tokenizer.chat_template is None:
            raise UserError("prompt.kind: this tokenizer has no chat template; choose bos, text or none")
        system = [] if self.text is None else [{"role": "system", "content": self.text}]
        rendered: list[Any] = []  # token ids
        for words in ("0", "x"):
            messages = [*system, {"role": "user", "content": words}]
            try:
                rendered.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
            except TemplateError as error:
                raise UserError(f"prompt: the chat template refuses such a conversation: {error}") from error
        if rendered[0] == rendered[1]:
            raise UserError("prompt.kind: the chat template here ignores the user's words; choose bos, text or none")
        common = 0  # the part that does not depend on the user's words
        while rendered[0][common] == rendered[1][common]:
            common += 1
        return list(rendered[0][:common])
