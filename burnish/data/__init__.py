"""From files to packed batches, with an audit of everything that happened on the way."""
