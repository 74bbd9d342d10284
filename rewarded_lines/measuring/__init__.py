"""Numbers about whole models, measured block by block, exactly the same for any threads and any sharding."""
