"""The HTTP server: OpenAI's and Anthropic's interfaces over an engine in another process. No torch here."""
