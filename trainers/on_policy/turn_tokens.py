"""What a chat template writes between an answer of the policy and its next one, as tokens."""

from align.data.bad_rows import BadRow
from align.data.encode import render
from align.data.ending import ANSWER, ASKED, ending_of, special_ids
from align.errors import ConfigError, RolloutError

PROBE = "Reply-4127"
MESSAGE_END = "<|eom_id|>"
"""Ends a call of Llama 3 as <|eot_id|> does, which most templates write: the model ends it with either."""


class TurnTokens:
    """The tokens of an environment's turn: the answer's end where the policy wrote another, the turn itself and the
    start of the next answer.

    Nothing that the policy wrote is tokenised again. The tokens are what the chat template's text of a conversation
    with the turn has more than its text without; a conversation of two messages stands for the real one. The end
    token of the answer splits the text wherever it stands, so they do not depend on what came before.

    Args:
        roles: of the turns, user or tool. Raises `ConfigError` for a template that cannot be used.

    `moves_system`: whether the template writes a system message elsewhere once a question follows an answer, as
    Mistral's do up to version 3, before the last one. A conversation with one cannot go on then.
    """

    def __init__(self, tokenizer, roles: list[str]):
        self.tokenizer = tokenizer
        ending = ending_of(tokenizer, True)
        if not ending.written:
            raise ConfigError(
                "conversations of several turns need a chat template that ends an answer with a token of its own, such "
                f"as <|im_end|>, and that of {tokenizer.name_or_path or 'this tokenizer'!r} has none"
            )
        self.end, self.call = ending.token, ending.call
        known = special_ids(tokenizer)
        self.message_end = next((i for i in known if tokenizer.convert_ids_to_tokens(i) == MESSAGE_END), None)
        for role in roles:
            try:
                _, text = self._text([{"role": role, "name": "probe", "content": PROBE}], {})
            except (BadRow, RolloutError) as error:
                raise ConfigError(f"{error} (tried with a message of role {role})") from error
            if PROBE not in text:
                raise ConfigError(
                    f"the chat template leaves messages of role {role} out: it cannot show them the policy"
                )
        self.moves_system = "user" in roles and self._moves_system()

    def _moves_system(self) -> bool:
        talk = [{"role": "system", "content": PROBE}, ASKED, {"role": "assistant", "content": ANSWER}]
        try:
            asked = render(talk[:2], self.tokenizer, {}, answer_next=True)
            after = render([*talk, {"role": "user", "content": "More"}], self.tokenizer, {}, answer_next=True)
        except BadRow:  # it takes no system message, which is said of the prompts that have one
            return False
        return asked.find(PROBE) != after.find(PROBE)

    def between(self, messages: list[dict], last_token: int, options: dict) -> list[int]:
        """Ids that follow an answer whose last token is `last_token`, up to where the next answer starts.

        messages: of the environment, all of one role. options: of the chat template, of this prompt."""
        end, text = self._text(messages, options)
        end_text = self.tokenizer.convert_ids_to_tokens(end)
        ids = self.tokenizer(end_text + text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids or ids[0] != end:
            raise RolloutError(f"the tokenizer does not read {end_text!r} at the start of a text as one token")
        either = {self.end, self.message_end}
        called = messages[0]["role"] == "tool" and end in either and None not in either
        return ids[1:] if last_token in (either if called else {end}) else ids

    def _text(self, messages: list[dict], options: dict) -> tuple[int, str]:
        """The answer's end token, and what follows it."""
        answer: dict = {"role": "assistant", "content": ANSWER}
        token, said = self.end, ANSWER
        # some templates name the tool after the call; others know the calls as what the policy wrote alone
        if messages[0]["role"] == "tool" and "tool_calls" in self.tokenizer.get_chat_template():
            calls = [{"type": "function", "function": {"name": m["name"], "arguments": {}}} for m in messages]
            answer["tool_calls"], said = calls, messages[-1]["name"]
            if self.call is not None:  # Gemma 4 writes the text of such an answer after what the tools said
                answer["content"], token = "", self.call
        before = render([ASKED, answer], self.tokenizer, options)
        after = render([ASKED, answer, *messages], self.tokenizer, options, answer_next=True)
        if self.message_end is not None and MESSAGE_END in before.rpartition(said)[2]:  # Llama 3.1 with builtin_tools
            token = self.message_end
        end_text = self.tokenizer.convert_ids_to_tokens(token)
        end = before.rfind(end_text) + len(end_text)
        if before.rfind(end_text) <= before.rfind(said) or not after.startswith(before[:end]):
            raise RolloutError(
                "the chat template writes an answer differently once a turn follows it, so the next turn cannot be put "
                "after what the policy has written: use a template whose text of a conversation begins with that of "
                "its first messages"
            )
        return token, after[end:]
