"""`llamac serve`: OpenAI's HTTP interface. The front knows no model; an engine process runs it."""
