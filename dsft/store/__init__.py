"""The token store: flat token shards with a document index, written once, read by memory map."""
