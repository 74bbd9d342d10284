"""Rows of Anthropic/hh-rlhf in our roles: dialogues of a human and an assistant, up to the assistant's last turn.

A row of the data: `chosen` and `rejected`, two dialogues that differ in their last turn. Every turn begins with a blank
line and "Human:" or "Assistant:".
"""

from __future__ import annotations

Row = dict[str, str]
# About 500 tokens; RiC leaves out dialogues of more than 512 (build_dataset_eval). With the response, a text has to fit
# into the 1,024 positions of the reward models.
LONGEST = 2000
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def demonstrations(row: Row) -> Row | None:
    """Return a dialogue and the reply that was liked better, to be imitated."""
    dialogue, reply = _split(row["chosen"])
    return {"prompt": dialogue, "completion": reply} if reply else None


def preferences(row: Row) -> Row | None:
    """Return a dialogue, the reply that was liked better, and the other one; None where they answer different ones."""
    dialogue, chosen = _split(row["chosen"])
    other, rejected = _split(row["rejected"])
    if not chosen or not rejected or dialogue != other:
        return None
    return {"prompt": dialogue, "chosen": chosen, "rejected": rejected}


def dialogues(row: Row) -> Row | None:
    """Return a dialogue to be answered."""
    dialogue, reply = _split(row["chosen"])
    return {"prompt": dialogue} if reply else None


def _split(text: str) -> tuple[str, str]:
    """Return a dialogue up to where the assistant speaks for the last time, and what it says then.

    The reply begins with a space, as in the data. Both are empty where nothing is said, the human has the last word, or
    the dialogue is too long.
    """
    dialogue, marker, reply = text.rpartition(ASSISTANT)
    said = reply.strip()
    if not marker or not said or HUMAN in reply or len(dialogue) > LONGEST:
        return "", ""
    return dialogue + marker, " " + said
