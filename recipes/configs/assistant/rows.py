"""Rows of Anthropic/hh-rlhf in our roles: dialogues of a human and an assistant, and the assistant's last reply.

A row of the data: `chosen` and `rejected`, two dialogues that differ in their last turn. Every turn begins with a blank
line and "Human:" or "Assistant:".
"""

from __future__ import annotations

Row = dict[str, str]
# Characters, about 500 tokens; RiC leaves out dialogues of over 512 tokens (build_dataset_eval). With the response, a
# text must fit into the 1,024 positions of the reward models.
LONGEST = 2000
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def demonstrations(row: Row) -> Row | None:
    """Return a dialogue and its better reply, as a demonstration."""
    dialogue, reply = _split(row["chosen"])
    return {"prompt": dialogue, "completion": reply} if reply else None


def preferences(row: Row) -> Row | None:
    """Return a dialogue, its better reply, and the other one; None if the replies answer different dialogues."""
    dialogue, chosen = _split(row["chosen"])
    other, rejected = _split(row["rejected"])
    if not chosen or not rejected or dialogue != other:
        return None
    return {"prompt": dialogue, "chosen": chosen, "rejected": rejected}


def dialogues(row: Row) -> Row | None:
    """Return a dialogue as a prompt."""
    dialogue, reply = _split(row["chosen"])
    return {"prompt": dialogue} if reply else None


def _split(text: str) -> tuple[str, str]:
    """Return a dialogue without its last reply, and that reply.

    The reply begins with a space, as in the data. Both are empty if the reply is empty, the human speaks last, or the
    dialogue is too long.
    """
    dialogue, marker, reply = text.rpartition(ASSISTANT)
    text = reply.strip()
    if not marker or not text or HUMAN in reply or len(dialogue) > LONGEST:
        return "", ""
    return dialogue + marker, f" {text}"
