"""Rows of openai/summarize_from_feedback, subset `comparisons`, in our roles: Reddit posts and their summaries.

A row of the data: `info` with `id`, `post` and `title`; `summaries`, two with a `text` each; `choice`, the index of the
better one. News articles have no post, only `article`.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# Posts of this many characters, as in Rewarded Soups (tasks/summary.py: MIN_SIZE, max_size) and RiC
# (build_dataset_summary).
SHORTEST, LONGEST = 100, 1200


def demonstrations(row: Row) -> Row | None:
    """Return a post and its better summary, as a demonstration."""
    post = _post(row)
    return None if post is None else {"prompt": post, "completion": _summaries(row)[0]}


def preferences(row: Row) -> Row | None:
    """Return a post, its better summary, and the other one."""
    post = _post(row)
    if post is None:
        return None
    chosen, rejected = _summaries(row)
    return {"prompt": post, "chosen": chosen, "rejected": rejected}


class Posts:
    """Returns each post once: the data has one row for each comparison of its summaries.

    This file is loaded again for every reading of the data, so each reading starts without memory.
    """

    def __init__(self) -> None:
        """Start a reading of the data."""
        self._seen: set[str] = set()

    def __call__(self, row: Row) -> Row | None:
        """Return the post, or None if it came before."""
        post = _post(row)
        if post is None or post in self._seen:
            return None
        self._seen.add(post)
        return {"prompt": post}


posts = Posts()


def _post(row: Row) -> str | None:
    """Return the post in one line; None if there is none or its length is out of range."""
    post = row["info"]["post"]
    if post is None or not SHORTEST < len(post) < LONGEST:
        return None
    return post.replace("\n", " ").strip()


def _summaries(row: Row) -> tuple[str, str]:
    """Return the better summary and the other one, each in one line."""
    texts = [summary["text"].replace("\n", " ").strip() for summary in row["summaries"]]
    better = row["choice"]
    return texts[better], texts[1 - better]
