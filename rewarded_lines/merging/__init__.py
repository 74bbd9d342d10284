"""The verb `merge` and what belongs to it: outputs written, their record, the record replayed, greedy soups."""
