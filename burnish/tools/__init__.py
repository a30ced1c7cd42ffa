"""Commands beside the recipes: `Config` and `main(config, ..., as_json)` in a file each."""
