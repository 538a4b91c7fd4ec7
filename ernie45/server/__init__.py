"""What listens: HTTP routes over the engine, and the chat page that a browser gets from them."""
