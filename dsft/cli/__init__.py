"""The command line. Every verb imports what it needs when it runs."""
