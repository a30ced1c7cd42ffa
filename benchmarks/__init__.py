"""One script a claim: `python -m benchmarks.NAME`. Rows go to results.csv, what they mean to LOG.md."""
