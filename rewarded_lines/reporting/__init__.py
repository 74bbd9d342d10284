"""What `report` writes and what `inspect` prints: tables and figures put together."""
