"""Raw records to token stores."""
