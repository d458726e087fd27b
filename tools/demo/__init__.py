"""How the embedded demo model is made: corpus, tokenizer, chats, training, quantization, export."""
