"""From text and messages to token ids and back: tokenizer, chat templates, detokenizer, GGUF vocabularies."""
