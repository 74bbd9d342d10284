"""Rows of openai/summarize_from_feedback, subset `comparisons`, in our roles: posts of Reddit and summaries of them.

A row of the data: `info` with `id`, `post`, `title` (of news articles, which have no post, only `article`), `summaries`
(two, each with a `text`), and `choice`, the index of the better one.
"""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]
# Rewarded Soups (tasks/summary.py: MIN_SIZE, max_size) and RiC (build_dataset_summary) take posts of this many letters.
SHORTEST, LONGEST = 100, 1200


def demonstrations(row: Row) -> Row | None:
    """Return a post and the summary that was liked better, to be imitated."""
    post = _post(row)
    return None if post is None else {"prompt": post, "completion": _summaries(row)[0]}


def preferences(row: Row) -> Row | None:
    """Return a post, the summary that was liked better, and the other one."""
    post = _post(row)
    if post is None:
        return None
    chosen, rejected = _summaries(row)
    return {"prompt": post, "chosen": chosen, "rejected": rejected}


class Posts:
    """Each post once: the data has as many rows of a post as there are comparisons of its summaries.

    What was seen is kept for one reading of the data, since this file is loaded anew for each.
    """

    def __init__(self) -> None:
        """Begin a reading."""
        self._seen: set[str] = set()

    def __call__(self, row: Row) -> Row | None:
        """Return the post, or None when it was there before."""
        post = _post(row)
        if post is None or post in self._seen:
            return None
        self._seen.add(post)
        return {"prompt": post}


posts = Posts()


def _post(row: Row) -> str | None:
    """Return the post in one line; None without one, or when it is not of the length that is used."""
    post = row["info"]["post"]
    if post is None or not SHORTEST < len(post) < LONGEST:
        return None
    return post.replace("\n", " ").strip()


def _summaries(row: Row) -> tuple[str, str]:
    """Return the better summary and the other one, each in one line."""
    texts = [summary["text"].replace("\n", " ").strip() for summary in row["summaries"]]
    better = row["choice"]
    return texts[better], texts[1 - better]
