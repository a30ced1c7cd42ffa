"""The decoder, how its weights are kept, and the adapters beside them."""
